"""A plain function as a reward."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from lit_specrl.rewards.arguments import required_arguments, takes_argument
from lit_specrl.rewards.base import Reward, Scores, snake_case
from lit_specrl.rewards.deadline import DeadlinePassed, DeadlineThread, await_until_deadline

MAX_SUCCESSIVE_TIMEOUTS = 3
"""Calls in a row that time out before the run ends: without rewards it learns nothing."""


class RewardFunction(Reward):
    """Scores with a plain or async function of TRL's signature.

    Only the columns that the function names are handed over, unless it takes `**kwargs`.

    With `timeout_s`, a call that takes longer counts as "does not apply" (`None`) for all its rows, which are counted
    (`timeouts`) and warned about; the third such call in a row is an error. An async function is cancelled, which
    takes effect where it awaits: one that blocks is not stopped. A plain function runs on a daemon thread, see
    `DeadlineThread`. It cannot be killed: while it hangs, further calls time out at once. On that thread signals do not
    work, which rules out math-verify (`MathReward` has a time limit of its own), and torch starts anew: current CUDA
    device 0, gradients on. Leave `timeout_s` out where that matters.

    Args:
        function: the function, or its import path "package.module.function" or "package.module:function".
        weight: factor of this reward in the total.
        name: name in the logs; by default the name of the function.
        timeout_s: time for one call, that is for all its rows, in seconds; without it a call may take for ever.
        conversational: give `prompts` and `completions` as TRL does for conversations, each a list of turns with `role`
            and `content`; a completion is one turn of the assistant, with the beginning that its prompt may give it.

    Raises:
        ValueError: the import path leads to no function, or `timeout_s` is not positive.
        TypeError: `function` is neither a function nor a path.

    Example::

        def brevity(completions, **kwargs):
            return [1.0 if len(text) < 200 else 0.0 for text in completions]

        RewardFunction(brevity)([""], ["short"])  # [1.0]
    """

    def __init__(
        self,
        function: str | Callable[..., Scores | Awaitable[Scores]],
        weight: float = 1.0,
        name: str | None = None,
        timeout_s: float | None = None,
        conversational: bool = False,
    ) -> None:
        self.function = import_function(function) if isinstance(function, str) else function
        if inspect.isclass(self.function):
            raise TypeError(
                f"a reward must be a Reward, a function or an import path, got the class {self.function.__name__}; give "
                f"an instance, such as {self.function.__name__}(), or class_path: {self.function.__name__} in YAML"
            )
        if not callable(self.function):
            raise TypeError(
                f"a reward must be a Reward, a function or an import path, got {self.function!r} "
                f"of type {type(self.function).__name__}"
            )
        super().__init__(weight, name or _function_name(self.function))
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise ValueError(
                f"timeout_s must be a positive number of seconds, got {timeout_s}; leave it out to wait without limit"
            )
        self.timeout_s, self.conversational = timeout_s, conversational
        self.required_columns = required_arguments(self.function)
        self._thread = None if timeout_s is None else DeadlineThread(timeout_s)
        self._num_successive_timeouts = 0

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if self.conversational:
            arguments |= _conversations(prompts, completions, columns.get("prompt_messages"))
        arguments = {name: values for name, values in arguments.items() if takes_argument(self.function, name)}
        call = partial(self.function, **arguments)
        if self._thread is None:
            return call()
        self.counters = {"timeouts": 0}
        if _is_async(self.function):
            return self._await(call, len(completions))
        try:
            scores = self._thread.call(call)
        except DeadlinePassed as error:
            return self._give_up(error, len(completions))
        if inspect.isawaitable(scores):
            return self._await(lambda: scores, len(completions))
        self._num_successive_timeouts = 0
        return scores

    async def _await(self, call: Callable[[], Any], num_rows: int) -> Scores:
        # Calling here and not outside leaves no coroutine behind when this one is closed before it starts.
        assert self.timeout_s is not None
        try:
            scores = await await_until_deadline(call(), self.timeout_s)
        except DeadlinePassed as error:
            return self._give_up(error, num_rows)
        self._num_successive_timeouts = 0
        return scores

    def _give_up(self, error: DeadlinePassed, num_rows: int) -> Scores:
        """Score nothing, or raise where that has become a habit."""
        self.counters = {"timeouts": num_rows}
        self._num_successive_timeouts += 1
        remedy = "Raise timeout_s if it is slow; if it hangs, give its own calls (requests, processes) a time limit."
        if self._num_successive_timeouts >= MAX_SUCCESSIVE_TIMEOUTS:
            raise RuntimeError(
                f"{self._num_successive_timeouts} calls in a row gave no scores, the last one {error}. {remedy}"
            )
        warnings.warn(
            f"reward {self.name!r} {error}: its {num_rows} rows count as None. {remedy}",
            stacklevel=3,
        )
        return [None] * num_rows


def _conversations(
    prompts: list[str], completions: list[str], messages: list[list[dict[str, str]]] | None
) -> dict[str, list[Any]]:
    """Prompts and completions as turns; a prompt without its conversation is one turn of the user."""
    conversations = [
        list(turns) or [{"role": "user", "content": prompt}]
        for prompt, turns in zip(prompts, messages or [[]] * len(prompts), strict=True)
    ]
    openings = [turns.pop()["content"] if turns[-1]["role"] == "assistant" else "" for turns in conversations]
    answers = [
        [{"role": "assistant", "content": opening + text}] for opening, text in zip(openings, completions, strict=True)
    ]
    return {"prompts": conversations, "completions": answers}


def import_function(path: str) -> Callable[..., Any]:
    """Import the function that "package.module.function" or "package.module:function" names.

    Raises:
        ValueError: the path has no module, the module is missing, or holds no callable of that name.
    """
    module_name, _, function_name = path.rpartition(":" if ":" in path else ".")
    if not module_name or not function_name:
        raise ValueError(f"a reward function is given as 'package.module.function', got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but misses a dependency of its own must report that dependency.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ImportError(
                f"reward function {path!r}: module {module_name!r} needs {error.name!r}, which is not installed"
            ) from error
        raise ValueError(
            f"reward function {path!r}: there is no module {error.name!r} in the working folder {Path.cwd()}, on "
            "PYTHONPATH, or installed; expected 'package.module.function'"
        ) from error
    except SyntaxError as error:
        raise ValueError(
            f"reward function {path!r}: {error.filename}, line {error.lineno} is not Python: {error.msg}"
        ) from error
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"reward function {path!r}: importing module {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    similar = get_close_matches(function_name, [name for name, value in vars(module).items() if callable(value)], 1)
    found = f"a {type(function).__name__}" if hasattr(module, function_name) else "no such name"
    raise ValueError(
        f"reward function {path!r}: expected a function {function_name!r} in module {module_name!r}, found {found}"
        + (f"; did you mean {similar[0]}?" if similar else "")
    )


def _function_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or snake_case(type(function).__name__)
    return name.strip("<>")  # "<lambda>"


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
