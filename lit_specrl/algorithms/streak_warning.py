"""A warning about what lasts."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn


class StreakWarning:
    """Warns when something has held in so many successive steps, once in a streak.

    Args:
        num_steps: length of the streak.
        message: with `{num_steps}` where their number belongs.
    """

    def __init__(self, num_steps: int, message: str) -> None:
        self.num_steps, self.message = num_steps, message
        self._length = 0

    def update(self, holds: bool) -> None:
        """Tell whether it held in this step."""
        self._length = self._length + 1 if holds else 0
        if self._length == self.num_steps:
            rank_zero_warn(self.message.format(num_steps=self.num_steps))
