"""Reward for sums that are written out and right."""

from __future__ import annotations

import re
from decimal import MAX_EMAX, Context, Decimal
from typing import Any

from lit_specrl.rewards.base import Reward

_EQUATION = re.compile(r"(?<![0-9])([0-9]++) *+\+ *+([0-9]++) *+= *+([0-9]++)")


class EquationReward(Reward):
    """Share of the equations "a + b = c" in a response that hold, where a certain number is asked for.

    A reward for the steps of a long answer: it differs between responses long before whole answers are right. Equations
    that are missing count as wrong, those beyond the number lower the share, and so does repeating oneself: an equation
    counts once.

    Args:
        num_equations: equations that a full answer has.
        weight: factor of this reward in the total.
        name: name in the logs, "equation" by default.

    Raises:
        ValueError: `num_equations` is not positive.

    Example::

        EquationReward(2)(["", ""], ["1 + 2 = 3. 3 + 4 = 8.", "1 + 2 = 3."])  # [0.5, 0.5]
    """

    def __init__(self, num_equations: int, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if num_equations < 1:
            raise ValueError(f"num_equations must be at least 1, got {num_equations}")
        self.num_equations = num_equations

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [self._share(text) for text in completions]

    def _share(self, text: str) -> float:
        written = [tuple(number.lstrip("0") or "0" for number in found) for found in _EQUATION.findall(text)]
        right = {(a, b) for a, b, c in written if _sum(a, b) == c}
        return len(right) / max(len(written), self.num_equations)


def _sum(a: str, b: str) -> str:
    """Add numbers of any length; `int` refuses text of more than 4,300 digits and takes quadratic time for it."""
    length = max(len(a), len(b)) + 1
    context = Context(prec=length, Emax=MAX_EMAX, traps=[])
    return format(context.add(Decimal(a), Decimal(b)), "f")
