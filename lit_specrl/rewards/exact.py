"""Reward for giving the reference answer to the letter."""

from __future__ import annotations

from typing import Any

from lit_specrl.answers import check_answer_format, extract_answer
from lit_specrl.rewards.base import Reward, column


class ExactReward(Reward):
    """1 where the answer equals the reference text, 0 elsewhere; rows without a reference are not scored.

    Args:
        answer_format: where a completion gives its answer, see `extract_answer`.
        ignore_case: whether upper and lower case are the same.
        weight: factor of this reward in the total.
        name: name in the logs, "exact" by default.

    Example::

        ExactReward("Answer: (.+)", ignore_case=True)(["Capital?"], ["Answer: paris"], answer=["Paris"])  # [1.0]
    """

    needs_answer = True

    def __init__(
        self, answer_format: str = "text", ignore_case: bool = False, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        check_answer_format(answer_format)
        self.answer_format = answer_format
        self.ignore_case = ignore_case

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [
            None if reference is None else float(self._equal(extract_answer(text, self.answer_format), reference))
            for text, reference in zip(completions, column(columns, "answer"), strict=True)
        ]

    def _equal(self, answer: str | None, reference: str) -> bool:
        if answer is None:
            return False
        answer, reference = answer.strip(), reference.strip()
        return answer.casefold() == reference.casefold() if self.ignore_case else answer == reference
