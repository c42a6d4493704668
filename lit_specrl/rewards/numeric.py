"""Reward for giving the right number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from lit_specrl.answers import check_answer_format, extract_answer
from lit_specrl.rewards.base import Reward, column
from lit_specrl.rewards.exact_number import parse_exact, readings


class NumericReward(Reward):
    r"""1 where the answer is the reference number, 0 elsewhere.

    Understood are `1,234.5`, `$18`, `3/4`, `1e-3`, `\frac{3}{4}`, `10^{-5}`, a trailing full stop and `%`, see
    `parse_exact`. A percentage is compared as written when both sides have the sign or neither has; when one has, both
    readings count: 50% is 50, and is 0.5. Rows without a reference are not scored, nor are those whose reference is no
    number (counted as `undecided`).

    Args:
        answer_format: where a completion gives its answer, see `extract_answer`.
        tolerance: accepted distance as a fraction of the reference; 0 asks for the very number.
        weight: factor of this reward in the total.
        name: name in the logs, "numeric" by default.

    Example::

        NumericReward()(["6 * 7 = "], ["That makes $42."], answer=["#### 42"])  # [1.0]
    """

    needs_answer = True

    def __init__(
        self, answer_format: str = "number", tolerance: float = 0.0, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        check_answer_format(answer_format)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}; 0.01 accepts one percent of distance")
        self.answer_format = answer_format
        self.tolerance = tolerance

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        self.counters = {"undecided": 0}
        return [
            None if reference is None else self._score(text, reference)
            for text, reference in zip(completions, column(columns, "answer"), strict=True)
        ]

    def _score(self, text: str, reference: str) -> float | None:
        expected = parse_exact(extract_answer(reference, "auto") or "")
        if expected is None:
            self.counters["undecided"] += 1
            return None
        given = parse_exact(extract_answer(text, self.answer_format) or "")
        if given is None:
            return 0.0
        margin = Fraction(self.tolerance) * abs(expected.value)
        return float(any(abs(reading.value - expected.value) <= margin for reading in readings(given, expected)))


def parse_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the number that `text` writes, and whether it writes it as a percentage; `None` if it is no number.

    Example::

        parse_number("$1,234.50")  # (Fraction(2469, 2), False)
        parse_number("-3/4")       # (Fraction(-3, 4), False)
        parse_number("50%.")       # (Fraction(50, 1), True)
    """
    number = parse_exact(text)
    return None if number is None else (number.value, number.is_percentage)
