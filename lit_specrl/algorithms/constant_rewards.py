"""A warning about rewards from which nothing can be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_specrl.algorithms.streak_warning import StreakWarning

NUM_STEPS = 10


class ConstantRewards:
    """Warns of each reward that gave every row the same in ten successive steps, or applied to none.

    Example::

        constant_rewards = ConstantRewards()
        for step in range(10):
            constant_rewards.update({"math": [0.0, 0.0]})  # the tenth call warns
    """

    def __init__(self, num_steps: int = NUM_STEPS) -> None:
        self.num_steps = num_steps
        self._streaks: dict[str, StreakWarning] = {}

    def update(self, rewards: Mapping[str, Sequence[float | None]]) -> None:
        """Take the rewards of one step.

        Args:
            rewards: by name, [N] values of all ranks' rows, `None` where the reward does not apply.
        """
        for name, values in rewards.items():
            scored = set(values) - {None}
            streak = self._streaks.setdefault(name, StreakWarning(self.num_steps, ""))
            streak.message = _message(name, scored)
            streak.update(len(values) > 1 and len(scored) < 2)


def _message(name: str, scored: set[float | None]) -> str:
    if not scored:
        found, look_at = "scored no row", "the answers of your data, which may be missing or in another form"
    else:
        found = f"gave all rows the same value (now {next(iter(scored))})"
        look_at = (
            "answer_format and the prompt template, which must lead the model to write its answer there, and the "
            "columns that the reward reads; a few rows of the log of completions show it"
        )
    name = name.replace("{", "{{").replace("}", "}}")
    return f"reward '{name}' {found} in {{num_steps}} steps in a row: nothing is learned from it. Look at {look_at}."
