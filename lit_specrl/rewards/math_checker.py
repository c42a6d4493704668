"""The process that decides whether two mathematical answers are equal.

`CheckerPool` runs this file as a script: a JSON list [reference, answer] per line on stdin, a verdict per line on
stdout. It imports nothing of the package, so a checker is small and starts in about a second. A check that takes too
long is ended by the kernel together with the process, because neither a Python signal handler nor a thread gets a turn
while the interpreter computes, say, 9**9**9.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys
from typing import Any

MAX_MEMORY = 4 * 2**30
"""Bytes of address space; an expression that asks for more fails inside its checker and nowhere else."""


def judge(reference: str, answer: str) -> str:
    """Return "right", "wrong", or "undecided" where the reference cannot be read as mathematics."""
    _compare_numbers_relatively()
    reference_sides, sides = _sides(reference), _sides(answer)
    if _is_computed(reference_sides):
        reference, reference_sides = _result(reference_sides), []
    expected = _read(reference)
    if all(isinstance(reading, str) for reading in expected):
        return "undecided"
    if not _sides_agree(sides):
        return "wrong"
    answers = [answer]
    if len(sides) > 1 and (len(reference_sides) < 2 or _is_computed(sides)):
        answers = [sides[-1] if _NAME.fullmatch(reference) else _result(sides)]
        if _is_computed(sides):
            answers += sides[:-1]  # the exact number, of which the last side is rounded
    return "right" if any(_is_equal(expected, _read(answer)) for answer in answers) else "wrong"


def _is_equal(expected: list[Any], given: list[Any]) -> bool:
    from math_verify import verify

    # This process is ended from outside, so the library's own alarms are off.
    is_right = verify(expected, given, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(is_right) or _same_region(expected, given)


_FORMULA_MARK = re.compile(r"(?<!\\)\$|\\\(|\\\[")
_PROSE = re.compile(r"[^\\]*[A-Za-z]{2,} [A-Za-z]{2,}[^\\]*")
_SET_BUILDER = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\\mid|\\vert|[|:]) ?(.*)\\\}", re.DOTALL)


def _read(text: str) -> list[Any]:
    r"""Return what the parser makes of a text, and the text.

    A formula that it cannot read to the end is nothing: the parser would go on to look for a number, and find 4 in
    `4\foo{2}`.
    """
    from math_verify import LatexExtractionConfig, parse

    if _PROSE.fullmatch(text) or _FORMULA_MARK.search(text):
        return parse(text, parsing_timeout=None)
    builder = _SET_BUILDER.fullmatch(text)
    text = f"${builder[1] if builder else text}$"  # the parser reads LaTeX only between dollars
    if "\\" in text:
        return parse(text, [LatexExtractionConfig()], parsing_timeout=None)
    return parse(text, parsing_timeout=None)


# ---------------------------------------------------------------------------------------------------------- equations

_RELATION = re.compile(
    r"\\(?:leq?|geq?|neq?|lt|gt|approx|in|equiv|sim|cong|to|rightarrow|implies)(?![a-zA-Z])|[<>≈,;:]|==|!=|\\q?quad|\\(?:text|mbox)\{ ?(?:or|and)|(?<![A-Za-z])(?:or|and)(?![A-Za-z])"
)
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")
_ARITHMETIC = re.compile(
    r"(?:\\(?:frac|sqrt|cdot|times|div|binom|pi|left|right|ln|log|sin|cos|tan)(?![a-zA-Z])|[\d\s+\-*/^(){}.!])+"
)
_DECIMAL = re.compile(r"-?\d*\.(\d+)")


def _sides(text: str) -> list[str]:
    """The sides of an equation or a chain of them; the text alone where it is none, or has other relations or several
    parts."""
    depth, start, sides = 0, 0, []
    for position, character in enumerate(text):
        depth += (character in "{([") - (character in "})]")
        if character == "=" and depth == 0:
            sides.append(text[start:position].strip())
            start = position + 1
    sides.append(text[start:].strip())
    return [text] if _RELATION.search(re.sub(r"(?<=[\w)}])!", "", text)) or not all(sides) else sides


def _is_computed(sides: list[str]) -> bool:
    """Whether an equation says what an expression without unknowns is, such as 2 + 3 = 5, or 5 = x."""
    others = sides[:-1]
    return bool(others) and all(_ARITHMETIC.fullmatch(side) for side in others)


def _result(sides: list[str]) -> str:
    """What an equation comes to: its last side, or in 5 = x the one before the name."""
    return sides[-2] if len(sides) > 1 and _NAME.fullmatch(sides[-1]) else sides[-1]


def _sides_agree(sides: list[str]) -> bool:
    """Whether the sides that are plain arithmetic are equal, or the last is what the others are rounded to."""
    from math_verify import verify

    constants = [side for side in sides if _ARITHMETIC.fullmatch(side)]
    if len(constants) < 2:
        return True
    *others, last = ([value for value in _read(side) if not isinstance(value, str)][:1] for side in constants)
    decimal = _DECIMAL.fullmatch(constants[-1])
    for other in others:
        if not other or not last or verify(last, other, timeout_seconds=None):
            continue
        if decimal is None or abs(other[0] - last[0]) * 2 > 10 ** -len(decimal[1]):
            return False
    return True


# -------------------------------------------------------------------------------------------------------- inequalities


def _same_region(expected: list[Any], given: list[Any]) -> bool:
    """Whether both are inequalities or sets of real numbers, and one holds where the other does."""
    from sympy import Set

    values = [next((value for value in readings if not isinstance(value, str)), None) for readings in (expected, given)]
    regions = [_region(value) for value in values]
    if None in regions or regions[0] != regions[1]:
        return False
    names = [
        {symbol.name for symbol in value.free_symbols}
        for value in values
        if value is not None and not isinstance(value, Set)
    ]
    return len(names) < 2 or names[0] == names[1]


def _region(value: Any) -> Any:
    """The real numbers that fulfil an inequality, or any of several; `None` for what is none and no set."""
    from sympy import And, FiniteSet, Interval, Rel, Union

    if isinstance(value, Interval | Union):
        return value
    parts = value.args if isinstance(value, FiniteSet) else (value,)
    if not parts or not all(isinstance(part, Rel | And) and len(part.free_symbols) == 1 for part in parts):
        return None
    if any(relation.rel_op in ("==", "!=") for part in parts for relation in part.atoms(Rel)):
        return None
    try:
        return Union(*(part.as_set() for part in parts))
    except Exception:  # sympy cannot solve it
        return None


# ------------------------------------------------------------------------------------------------------------- numbers

SIGNIFICANT = 5e-6
"""Distance as a fraction of the number within which a float counts as equal: six significant digits."""
SAMPLES = ("17/11", "-13/7", "23/5", "5/13", "-3/17", "29/19", "-31/9", "41/3", "1/23", "-53/29")
"""Values of the variables at which two formulas are compared."""


def _compare_numbers_relatively() -> None:
    """Let math-verify tell small numbers apart.

    It rounds floats to six places after the point and takes a difference below 1e-15 for none: 2e-7 would be 1e-7, and
    1/2006! 1/2004!. It also takes sqrt(1/n) and 1/sqrt(n) for different, because they are where n is negative.
    """
    from math_verify import grader

    if getattr(grader.sympy_numeric_eq, "is_relative", False):
        return
    numeric_eq, symbolic_eq = grader.sympy_numeric_eq, grader.sympy_symbolic_eq

    def relative(a: Any, b: Any, *precision: int) -> bool:
        return bool(numeric_eq(a, b, *precision)) and _close(a, b)

    def where_real(a: Any, b: Any) -> bool:
        return bool(symbolic_eq(a, b)) or _equal_where_real(a, b)

    relative.is_relative = True  # type: ignore[attr-defined]
    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = relative, where_real


def _close(a: Any, b: Any) -> bool:
    from math_verify.grader import get_pct_val, safe_sympy_doit
    from sympy import MatrixBase, Rational

    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase) or get_pct_val(a, a) == get_pct_val(b, b):
        return True  # entries of matrices come one by one
    a, b = safe_sympy_doit(a), safe_sympy_doit(b)
    symbols = sorted((a - b).free_symbols, key=str)
    if not symbols:
        return _close_numbers(a, b)
    point = {symbol: Rational(SAMPLES[index % len(SAMPLES)]) for index, symbol in enumerate(symbols)}
    return _close_numbers(a.subs(point), b.subs(point))


def _close_numbers(a: Any, b: Any) -> bool:
    from sympy import Float

    difference = a - b
    if a.has(Float) or b.has(Float):
        return bool(abs(difference.evalf(30)) <= SIGNIFICANT * abs(b.evalf(30)))
    if difference.is_Rational:
        return bool(difference == 0)
    value = difference.evalf(15, maxn=1000)
    return all(part == 0 or part._prec == 1 for part in value.as_real_imag())  # precision 1: no digit is sure


def _equal_where_real(a: Any, b: Any) -> bool:
    """Whether two formulas are real at the same points and equal there, judged by samples."""
    from sympy import Derivative, Float, Integral, Limit, Product, Rational, Sum
    from sympy.core.function import AppliedUndef

    symbols = sorted(a.free_symbols, key=str)
    if not 0 < len(symbols) <= 3 or a.free_symbols != b.free_symbols:
        return False
    if any(formula.has(Float, Sum, Product, Integral, Limit, Derivative, AppliedUndef) for formula in (a, b)):
        return False
    num_real = 0
    for shift in range(len(SAMPLES)):
        point = {symbol: Rational(SAMPLES[(shift + 3 * i) % len(SAMPLES)]) for i, symbol in enumerate(symbols)}
        x, y = a.subs(point), b.subs(point)
        is_real = [bool(value.evalf(20).is_real) for value in (x, y)]
        if is_real[0] != is_real[1]:
            return False
        if all(is_real):
            if not abs((x - y).evalf(20)) <= 1e-12 * abs(y.evalf(20)) or not _close_numbers(x, y):
                return False
            num_real += 1
    return num_real >= 4


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
