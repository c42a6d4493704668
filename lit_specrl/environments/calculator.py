"""A calculator that the policy may ask before it answers."""

from __future__ import annotations

import re
from fractions import Fraction

from lit_specrl.environments.base import Environment, Observation
from lit_specrl.rewards.exact_number import parse_exact

MAX_DIGITS = 100
"""Of a result before the point; a longer one would only fill the response."""


class CalculatorEnvironment(Environment):
    """Computes what a turn asks for, and ends with a turn that asks for nothing.

    Args:
        pattern: regular expression of a call, whose first group is what to compute: sums, differences, products,
            quotients and powers of numbers, with brackets. It is looked for in the whole turn; the last call counts.
        error: what the policy reads instead of a result where that is no number, or has more than 100 digits.
        role: whose message the result is in a chat template.

    Raises:
        ValueError: `pattern` is no regular expression with a group.

    Example:
        >>> calculator = CalculatorEnvironment()
        >>> calculator.step("calc: 12 + 6 * 3")
        Observation(text='30', reward=None, role='user')
        >>> calculator.step("Answer: 30")
    """

    def __init__(self, pattern: str = r"calc:(.*)", error: str = "not a number", role: str = "user") -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as problem:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {problem}") from problem
        if not self._pattern.groups:
            raise ValueError(f"pattern must have a group around what to compute, such as 'calc:(.*)', got {pattern!r}")
        self.pattern, self.error, self.role = pattern, error, role

    def step(self, text: str) -> Observation | str | None:
        calls = list(self._pattern.finditer(text))
        if not calls:
            return None
        number = parse_exact(calls[-1][1].strip())
        result = None if number is None else shown(number.value)
        return Observation(self.error if result is None else result, role=self.role)


def shown(value: Fraction) -> str | None:
    """A number as text: whole, or a decimal of six digits; `None` for one of more than `MAX_DIGITS`.

    Example:
        >>> shown(Fraction(30)), shown(Fraction(1, 3)), shown(Fraction(10) ** 400)
        ('30', '0.333333', None)
    """
    if abs(value) >= 10**MAX_DIGITS:
        return None
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
