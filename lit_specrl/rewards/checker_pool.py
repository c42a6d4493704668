"""Checker processes that are killed when they take too long.

Why not `multiprocessing` or a pool built on it: its spawned workers import the user's main module again. A training
script that imports torch at the top would load it in every worker, at every restart after a hung expression; one
without `if __name__ == "__main__"` would start training there.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, cast

Verdict = Literal["right", "wrong", "undecided", "timeout", "crash"]

START_LIMIT_S = 120.0
KILL_GRACE_S = 2.0
MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3


class CheckerPool:
    """Decides pairs of (reference, answer) in a few processes, each pair within a deadline.

    A checker that exceeds the deadline ends and a new one takes its place; the other checkers go on meanwhile. Checkers
    start at the first call, stay warm between calls, and end with this object or with the process, even one that is
    killed.

    Args:
        num_workers: number of checker processes.
        timeout_s: time for one pair, in seconds; starting a checker does not count.

    Example::

        pool = CheckerPool()
        pool.check([("1/2", "0.5"), ("2", "3"), ("1", "9^{9^{9^9}}")])  # ["right", "wrong", "timeout"]
        pool.close()
    """

    def __init__(self, num_workers: int = 2, timeout_s: float = 5.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self._checkers: list[_Checker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _stop, self._checkers)

    def __reduce__(self) -> tuple[type[CheckerPool], tuple[int, float]]:
        return CheckerPool, (self.num_workers, self.timeout_s)

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return the verdict on each pair, in order.

        Args:
            pairs: (reference, answer), each in LaTeX or plain notation.

        Raises:
            RuntimeError: a checker does not start.
        """
        with self._lock:
            # In a forked process this drops the parent's checkers unharmed: `poll` takes what is no child of ours for
            # ended.
            self._drop([checker for checker in self._checkers if checker.process.poll() is not None])
            try:
                return self._check_all(pairs)
            except BaseException:  # a checker that is left in the middle of a pair would answer the next call with it
                _stop(self._checkers)
                raise

    def close(self) -> None:
        """End the checkers; the next call starts new ones."""
        with self._lock:
            _stop(self._checkers)

    def _check_all(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        verdicts: list[Verdict] = ["crash"] * len(pairs)
        attempts = [0] * len(pairs)
        num_failed_starts = 0
        waiting = deque(range(len(pairs)))
        with selectors.DefaultSelector() as selector:
            for checker in self._checkers:
                selector.register(checker.replies, selectors.EVENT_READ, checker)
            while waiting or any(checker.pair is not None for checker in self._checkers):
                self._start_missing(selector, len(pairs))
                for checker in self._checkers:
                    if waiting and checker.is_idle:
                        checker.pair = waiting.popleft()
                        attempts[checker.pair] += 1
                        checker.send(pairs[checker.pair], self.timeout_s + KILL_GRACE_S)
                for checker, has_replied in self._wait(selector):
                    pair, verdict = checker.receive(has_replied)
                    if checker.is_gone:
                        selector.unregister(checker.replies)
                        self._drop([checker])
                        num_failed_starts += checker.is_starting
                    if num_failed_starts > MAX_FAILED_STARTS:
                        raise RuntimeError(f"{num_failed_starts} answer checkers ended before they were ready")
                    if pair is not None and verdict == "crash" and attempts[pair] < MAX_ATTEMPTS:
                        waiting.append(pair)
                    elif pair is not None:
                        verdicts[pair] = verdict
        return verdicts

    def _start_missing(self, selector: selectors.BaseSelector, num_pairs: int) -> None:
        while len(self._checkers) < min(self.num_workers, num_pairs):
            checker = _Checker(self.timeout_s)
            self._checkers.append(checker)
            selector.register(checker.replies, selectors.EVENT_READ, checker)

    def _wait(self, selector: selectors.BaseSelector) -> list[tuple[_Checker, bool]]:
        """Wait for checkers that have replied or ended (True), or should have by now (False)."""
        expires_at = min(checker.expires_at for checker in self._checkers)
        events = selector.select(max(expires_at - time.monotonic(), 0.0))
        replied = {key.data for key, _ in events}
        overdue = {c for c in self._checkers if c not in replied and c.expires_at <= time.monotonic()}
        return [(checker, True) for checker in replied] + [(checker, False) for checker in overdue]

    def _drop(self, checkers: list[_Checker]) -> None:
        for checker in checkers:
            checker.stop()
            self._checkers.remove(checker)


class _Checker:
    """One checker process: starting, then idle or busy with a pair, at last gone."""

    def __init__(self, timeout_s: float) -> None:
        script = Path(__file__).with_name("math_checker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(timeout_s), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.pair: int | None = None
        self.is_starting = True
        self.is_gone = False
        self.expires_at = time.monotonic() + START_LIMIT_S

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.pair is None

    def send(self, pair: tuple[str, str], limit_s: float) -> None:
        self.expires_at = time.monotonic() + limit_s
        try:
            self.requests.write(json.dumps(pair).encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:
            pass  # it ended between two calls: `receive` finds out

    def receive(self, has_replied: bool) -> tuple[int | None, Verdict]:
        """Return the pair that was checked, `None` if none was, and the verdict on it.

        Args:
            has_replied: whether something, be it the end of the stream, can be read; otherwise the checker is overdue.

        Raises:
            RuntimeError: the checker reports that it cannot start.
        """
        reply = self.replies.readline().decode().strip() if has_replied else ""
        if self.is_starting and reply and reply != "ready":
            raise RuntimeError(f"an answer checker did not start: {reply}")
        pair, self.pair = self.pair, None
        self.expires_at = float("inf")
        if reply:
            self.is_starting = False
            return pair, cast("Verdict", reply)
        self.is_gone = True
        return pair, "timeout" if not has_replied or self.process.wait() == -signal.SIGALRM else "crash"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # a request was still in the buffer
            self.requests.close()
        self.replies.close()


def _stop(checkers: list[_Checker]) -> None:
    for checker in checkers:
        checker.stop()
    checkers.clear()
