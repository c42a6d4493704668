"""The process that decides whether two mathematical answers are equal.

`CheckerPool` runs this file as a script: a JSON list [reference, answer] per line on stdin, a verdict per line on stdout.
It imports nothing of the package, so a checker is small and starts in about a second. A check that takes too long is ended by
the kernel together with the process, because neither a Python signal handler nor a thread gets a turn while the interpreter
computes, say, 9**9**9.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys

MAX_MEMORY = 4 * 2**30
"""Bytes of address space; an expression that asks for more fails inside its checker and nowhere else."""


def judge(reference: str, answer: str) -> str:
    """Return "right", "wrong", or "undecided" where the reference cannot be read as mathematics."""
    from math_verify import parse, verify

    # This process is ended from outside, so the library's own alarms are off.
    expected = parse(_delimited(reference), parsing_timeout=None)
    if all(isinstance(reading, str) for reading in expected):
        return "undecided"
    given = parse(_delimited(answer), parsing_timeout=None)
    return "right" if verify(expected, given, timeout_seconds=None) else "wrong"


_FORMULA_MARK = re.compile(r"(?<!\\)\$|\\\(|\\\[")
_PROSE = re.compile(r"[^\\]*[A-Za-z]{2,} [A-Za-z]{2,}[^\\]*")


def _delimited(text: str) -> str:
    """Put LaTeX between dollars: the parser reads formulas only there. Prose goes as it is, to have its number found."""
    return text if _PROSE.fullmatch(text) or _FORMULA_MARK.search(text) else f"${text}$"


def limit_memory(num_bytes: int) -> None:
    """Let allocations beyond `num_bytes` of address space fail."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard_limit == resource.RLIM_INFINITY else min(num_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))


def main(timeout_s: float, parent_id: int) -> None:
    """Answer requests until stdin closes or the parent is gone."""
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not end up among the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, whatever it computes
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    limit_memory(MAX_MEMORY)
    try:
        judge(r"\frac{1}{2}", "0.25 + 0.25")  # the first parse builds tables
    except Exception as error:
        os.write(replies, f"{type(error).__name__}: {error}".replace("\n", " ").encode() + b"\n")
        return
    os.write(replies, b"ready\n")
    while True:
        # A process forked from the parent may hold our stdin open beyond the parent's death.
        while not select.select([sys.stdin], [], [], 5.0)[0]:
            if os.getppid() != parent_id:
                return
        request = sys.stdin.buffer.readline()
        if not request:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            verdict = judge(*json.loads(request))
        except Exception:
            verdict = "wrong"
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, verdict.encode() + b"\n")


if __name__ == "__main__":
    main(timeout_s=float(sys.argv[1]), parent_id=int(sys.argv[2]))
