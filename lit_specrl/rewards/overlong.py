"""Penalty for responses that come close to the length limit."""

from __future__ import annotations

from typing import Any

from lit_specrl.rewards.base import Reward, column


class OverlongReward(Reward):
    """Soft punishment of overlong responses.

    Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13: 0 up to `max_completion_length - overlong_buffer` tokens, from
    there linearly down to -1 at `max_completion_length`, -1 beyond.

    Args:
        max_completion_length: longest response, in tokens, L_max.
        overlong_buffer: tokens before the limit in which the penalty grows, L_cache.
        weight: factor of this reward in the total.
        name: name in the logs, "overlong" by default.

    Example: a limit of 10 tokens with a buffer of 4::

        OverlongReward(10, 4)(["", ""], ["", ""], completion_ids=[[0] * 6, [0] * 9])  # [0.0, -0.75]
    """

    def __init__(
        self, max_completion_length: int, overlong_buffer: int, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        if not 0 < overlong_buffer <= max_completion_length:
            raise ValueError(
                f"overlong_buffer must lie between 1 and max_completion_length ({max_completion_length} tokens), "
                f"got {overlong_buffer}"
            )
        self.max_completion_length = max_completion_length
        self.overlong_buffer = overlong_buffer

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [self._penalty(len(ids)) for ids in column(columns, "completion_ids")]

    def _penalty(self, length: int) -> float:
        excess = length - (self.max_completion_length - self.overlong_buffer)
        return -min(max(excess, 0) / self.overlong_buffer, 1.0) if excess > 0 else 0.0
