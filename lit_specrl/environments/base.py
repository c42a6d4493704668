"""What answers a policy between its turns."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Observation:
    """What an environment answers to a turn.

    Args:
        text: what the policy reads before its next turn; `None` ends the row.
        reward: added to the reward of the row (`EnvironmentReward`); `None` for nothing.
        role: whose message it is in a chat template, such as "user" or "tool"; a plain prompt knows no roles.

    Example::

        Observation("8")                # the policy goes on
        Observation(None, reward=1.0)   # the end
    """

    text: str | None
    reward: float | None = None
    role: str = "user"


class Environment(ABC):
    """Answers the policy between its turns, for one row.

    The environment that the module is given is never stepped itself: each row of a step gets a copy of it, and the copy
    is closed when the rewards of the row are known, or the run ends before that.

    Example: the policy may guess a number three times::

        class Guess(Environment):
            def reset(self, row):
                self.secret, self.left = int(row["answer"]), 3

            def step(self, text):
                self.left -= 1
                if not text.strip().isdigit() or not self.left or int(text) == self.secret:
                    return None
                return "more" if int(text) < self.secret else "less"
    """

    num_threads: ClassVar[int] = 1
    """Rows that are stepped at the same time; more than 1 for environments that wait for something else."""

    def reset(self, row: dict[str, Any]) -> str | None:
        """Begin with a row of the data.

        Args:
            row: `prompt` (rendered), `answer`, `source` and the further columns of the data. The rows of a group get
                the same.

        Returns:
            Text that is added to the prompt, the same for all rows of a group; `None` for nothing.
        """
        return None

    @abstractmethod
    def step(self, text: str) -> Observation | str | None:
        """Answer a turn.

        Args:
            text: what the policy has said in it, decoded as rewards see it.

        Returns:
            What the policy reads next: a text, or an `Observation` with its reward or role; `None` ends the row.

        Raises:
            Exception: anything; it ends the run, with a message that names the row.
        """

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Tools that chat templates show in the prompt, as JSON schemas."""
        return []

    @property
    def unwrapped(self) -> Any:
        """What rewards see of it in `environments`."""
        return self

    def copy(self) -> Environment:
        """An environment of the same settings for another row; a deep copy, where a class does not say otherwise."""
        return copy.deepcopy(self)

    def close(self) -> None:
        """Release what the environment of a row holds; called once, also where `reset` was never called or raised."""
