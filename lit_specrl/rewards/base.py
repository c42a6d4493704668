"""What every reward has: a weight, a name and a call that scores rows."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, ClassVar

from lit_specrl.checkpoints.identity import identity_of, settings_of
from lit_specrl.rewards.arguments import required_arguments

Scores = Sequence[float | None]
"""One number per row; `None` where the reward does not apply."""


class Reward(ABC):
    """Scores completions, one number per row.

    Args:
        weight: factor of this reward in the total; 0 reports it without training on it.
        name: name in the logs; by default the class name in snake case without "Reward".

    Example::

        class BrevityReward(Reward):
            def __call__(self, prompts, completions, **columns):
                return [1.0 if len(text) < 200 else 0.0 for text in completions]

        BrevityReward(weight=0.1).name  # "brevity"
    """

    needs_answer: ClassVar[bool] = False
    """Whether rows without a reference answer cannot be scored."""

    required_columns: Collection[str] = ()
    """Columns without which the reward cannot be called, beside those that its call names."""

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight}")
        if name == "":
            raise ValueError("name must not be empty; leave it out to name the reward after its class")
        self.weight = weight
        self.name = name or snake_case(type(self).__name__.removesuffix("Reward"))
        self.counters: dict[str, int] = {}
        """Counts of the latest call, such as time-outs; logged as `rewards/{name}/{counter}`."""

    @abstractmethod
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        """Score every row.

        Args:
            prompts: [N] rendered prompts.
            completions: [N] decoded responses.
            columns: lists of N values: `answer`, `source`, `completion_ids`, `finish_reason`, `prompt_messages` (the
                conversations that the prompts show), columns of the data set.

        Returns:
            [N] numbers, `None` where the reward does not apply; or an awaitable of them.
        """

    def needed_columns(self) -> set[str]:
        """Columns without which the reward cannot be called; checked before a run."""
        return {*self.required_columns, *required_arguments(self, num_given=2, follow_wrapped=False)}

    def identity(self) -> str:
        """Return a text that names what makes the numbers: the code and the settings of this reward.

        It stays the same from process to process and differs where the numbers may: another function under the same
        name, another constant, another `answer_format`. The weight and the name are no part of it. See `identity_of`
        for what counts.
        """
        return identity_of(type(self), self._made_by())

    def _made_by(self) -> dict[str, Any]:
        """Return what the numbers depend on besides the code: the attributes that are public or hold a constructor
        argument."""
        return {
            name: value
            for name, value in settings_of(self).items()
            if name not in ("weight", "name", "counters", "required_columns")
        }

    def close(self) -> None:
        """Release what the reward holds, such as worker processes; the next call may start it again."""


def column(columns: dict[str, Any], name: str) -> list[Any]:
    """Return a column that a reward cannot do without.

    Raises:
        ValueError: the data has no such column.
    """
    if name not in columns:
        present = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"the column {name!r} is needed, but the columns are: {present}")
    return columns[name]


def snake_case(name: str) -> str:
    """Return a CamelCase name in snake case: "TidyAnswer" becomes "tidy_answer"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower() or "reward"
