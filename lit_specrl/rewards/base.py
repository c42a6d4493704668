"""What every reward has: a weight, a name and a call that scores rows."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

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
            columns: lists of N values: `answer`, `source`, `completion_ids`, `finish_reason`, columns of the data set.

        Returns:
            [N] numbers, `None` where the reward does not apply; or an awaitable of them.
        """

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
