"""The environments of the rows of a request: made, asked and closed, each by a call that names the row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, TypeVar

from lit_specrl.environments import Environment, Observation
from lit_specrl.types import PromptBatch

T = TypeVar("T")


class RowEnvironments:
    """A copy of an environment for each row.

    Args:
        environment: is copied.
        prompts: [B]
        group_size: rows per prompt, G.
    """

    def __init__(self, environment: Environment, prompts: PromptBatch, group_size: int) -> None:
        self.environment, self.prompts, self.group_size = environment, prompts, group_size
        self.of_rows: list[Environment] = []
        """[N], as far as they are made."""

    def begin(self) -> list[str | None]:
        """Make and reset them.

        Returns:
            [B] what they say first.

        Raises:
            ValueError: what they say first differs within a group.
            TypeError: it is no text.
            RuntimeError: one raised; names the row, the cause is attached.
        """
        size = self.group_size
        for row in range(len(self.prompts) * size):
            self.of_rows.append(self._call(self.environment, "copy", row))
        columns = [_columns(self.prompts, index) for index in range(len(self.prompts))]
        said = self._map(lambda row: self._reset(row, deepcopy(columns[row // size])), range(len(self.of_rows)))
        for index in range(len(self.prompts)):
            group = said[index * size : (index + 1) * size]
            if any(text != group[0] for text in group):
                raise ValueError(
                    f"{type(self.environment).__name__}.reset must return the same for all rows of a group, which are "
                    f"compared with each other, got {group[0]!r} and others for the prompt "
                    f"{self.prompts.prompts[index][-80:]!r}"
                )
        return said[::size]

    def step(self, texts: Mapping[int, str]) -> list[Observation]:
        """Tell rows what the policy has said.

        Args:
            texts: by row.

        Returns:
            What they answer, in the order of the rows.

        Raises:
            TypeError: an answer is none.
            RuntimeError: one raised; names the row, the cause is attached.
        """
        return self._map(lambda row: self._step(row, texts[row]), list(texts))

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        index, number = divmod(row, self.group_size)
        return f"in row {number} of the prompt {self.prompts.prompts[index][-80:]!r} (uid {self.prompts.uids[index]})"

    def close(self) -> None:
        """Close all that are made, also where closing one of them raises.

        Raises:
            RuntimeError: the first of what they raised; names the row, the cause is attached.
        """
        errors = []
        for row, environment in enumerate(self.of_rows):
            try:
                self._call(environment, "close", row)
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def abandon(self) -> None:
        """`close` behind an exception, which is the one to be seen: what closing raises is told as a warning.

        It may be called of environments that were never reset.
        """
        try:
            self.close()
        except RuntimeError as error:
            warnings.warn(f"behind another error: {error}", stacklevel=2)

    def _reset(self, row: int, columns: dict[str, Any]) -> str | None:
        environment = self.of_rows[row]
        said: Any = self._call(environment, "reset", row, columns)
        if said is None or isinstance(said, str):
            return said if said is None else _readable(said)
        raise TypeError(
            f"{type(environment).__name__}.reset must return a text or None, got {_shown(said)}; {self.where(row)}"
        )

    def _step(self, row: int, text: str) -> Observation:
        environment = self.of_rows[row]
        answer: Any = self._call(environment, "step", row, text)
        if answer is None or isinstance(answer, str):
            answer = Observation(answer)
        name = f"{type(environment).__name__}.step"
        if not isinstance(answer, Observation):
            raise TypeError(
                f"{name} must return a text, an Observation or None, got {_shown(answer)}; {self.where(row)}"
            )
        said: Any = answer.text
        if not (said is None or isinstance(said, str)):
            raise TypeError(f"the text of {name} must be a text or None, got {_shown(said)}; {self.where(row)}")
        try:
            reward = None if answer.reward is None else float(answer.reward)
        except (TypeError, ValueError):
            raise TypeError(
                f"the reward of {name} must be a number or None, got {_shown(answer.reward)}; {self.where(row)}"
            ) from None
        return Observation(said if said is None else _readable(said), reward, answer.role)

    def _call(self, environment: Environment, name: str, row: int, *arguments: Any) -> Any:
        """Call a method; an exception, or an attempt to end the process, names the row."""
        try:
            return getattr(environment, name)(*arguments)
        except (Exception, SystemExit) as error:
            given = "".join(f", on {str(argument)[:80]!r}" for argument in arguments)
            raise RuntimeError(
                f"{type(environment).__name__}.{name} raised {type(error).__name__}: {error}; {self.where(row)}{given}"
            ) from error

    def _map(self, function: Callable[[int], T], rows: Sequence[int]) -> list[T]:
        """The function of every row, of as many rows at the same time as the environment says."""
        if self.environment.num_threads == 1 or len(rows) < 2:
            return [function(row) for row in rows]
        with ThreadPoolExecutor(min(self.environment.num_threads, len(rows))) as threads:
            return list(threads.map(function, rows))


def _columns(prompts: PromptBatch, index: int) -> dict[str, Any]:
    """What `reset` is given."""
    columns = prompts.columns[index] if prompts.columns else {}
    return columns | {
        "prompt": prompts.prompts[index],
        "answer": prompts.answers[index],
        "source": prompts.sources[index],
    }


def _readable(text: str) -> str:
    r"""The text with U+FFFD for each half of a surrogate pair, which is no character: tokenizers refuse it.

    JSON that the policy writes may bring one about, such as `"\ud83d"`.

    Example:
        >>> _readable("\ud83d!") == "\ufffd!"
        True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(value: Any) -> str:
    return f"{value!r:.200} of type {type(value).__name__}"
