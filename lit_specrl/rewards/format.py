"""Reward for keeping to a form."""

from __future__ import annotations

import re
from typing import Any

from lit_specrl.rewards.base import Reward


class FormatReward(Reward):
    r"""1 where the whole completion matches a regular expression, 0 elsewhere.

    Args:
        pattern: regular expression for the completion without surrounding white space; `.` matches line breaks too.
            Nested repetitions such as `(a+)+` may take exponential time.
        weight: factor of this reward in the total.
        name: name in the logs, "format" by default.

    Example::

        FormatReward("<think>.*</think>.*")(["2+2="], ["<think>easy</think> 4"])  # [1.0]
    """

    def __init__(self, pattern: str, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [1.0 if self.pattern.fullmatch(text.strip()) else 0.0 for text in completions]
