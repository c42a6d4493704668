"""Reward for giving the right number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from lit_specrl.rewards.answers import check_answer_format, extract_answer
from lit_specrl.rewards.base import Reward, column

MAX_NUMBER_LENGTH = 100
"""Characters; longer strings of digits are no answer, and exact arithmetic on them would cost."""


class NumericReward(Reward):
    r"""1 where the answer is the reference number, 0 elsewhere.

    Understood are `1,234.5`, `$18`, `3/4`, `1e-3`, a trailing full stop and `%`. A percentage is compared as written when
    both sides have the sign or neither has; when one has, both readings count: 50% is 50, and is 0.5. Rows without a
    reference are not scored, nor are those whose reference is no number (counted as `undecided`).

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
        expected = parse_number(extract_answer(reference, "auto") or "")
        if expected is None:
            self.counters["undecided"] += 1
            return None
        given = parse_number(extract_answer(text, self.answer_format) or "")
        return 0.0 if given is None else float(self._equal(given, expected))

    def _equal(self, given: tuple[Fraction, bool], expected: tuple[Fraction, bool]) -> bool:
        (number, is_percentage), (reference, reference_is_percentage) = given, expected
        readings = [number]
        if is_percentage and not reference_is_percentage:
            readings.append(number / 100)
        if reference_is_percentage and not is_percentage:
            readings.append(number * 100)
        margin = Fraction(self.tolerance) * abs(reference)
        return any(abs(reading - reference) <= margin for reading in readings)


_NUMBER = re.compile(r"([-+]?)(\d*\.?\d*(?:e[-+]?\d{1,3})?)(?:/(\d+))?(%?)", re.IGNORECASE)


def parse_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the number that `text` writes, and whether it writes it as a percentage; `None` if it is no number.

    Example::

        parse_number("$1,234.50")  # (Fraction(2469, 2), False)
        parse_number("-3/4")       # (Fraction(-3, 4), False)
        parse_number("50%.")       # (Fraction(50, 1), True)
    """
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    bare = re.sub(r"[\\$,\s!]", "", text).rstrip(".")
    match = _NUMBER.fullmatch(bare)
    if match is None or not re.match(r"\.?\d", match[2]) or (match[3] and not match[3].strip("0")):
        return None
    number = Fraction(match[2].rstrip(".")) / int(match[3] or 1)
    return (-number if match[1] == "-" else number), bool(match[4])
