"""What an environment gives."""

from __future__ import annotations

from typing import Any

from lit_specrl.rewards.base import Reward, column


class EnvironmentReward(Reward):
    """The reward that the environment of a row has given, added up over its turns.

    Does not apply to rows to which it has given none.

    Args:
        weight: factor of this reward in the total.
        name: name in the logs, "environment" by default.

    Example::

        GRPO(model, rewards=[EnvironmentReward()], environment=Guess())
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return list(column(columns, "environment_reward"))
