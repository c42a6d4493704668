"""A plain function as a reward."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from lit_specrl.rewards.base import Reward, Scores, snake_case


class RewardFunction(Reward):
    """Scores with a plain or async function of TRL's signature.

    Only the columns that the function names are handed over, unless it takes `**kwargs`.

    Args:
        function: the function, or its import path "package.module.function" or "package.module:function".
        weight: factor of this reward in the total.
        name: name in the logs; by default the name of the function.

    Raises:
        ValueError: the import path leads to no function.
        TypeError: `function` is neither a function nor a path.

    Example::

        def brevity(completions, **kwargs):
            return [1.0 if len(text) < 200 else 0.0 for text in completions]

        RewardFunction(brevity)([""], ["short"])  # [1.0]
    """

    def __init__(
        self, function: str | Callable[..., Scores | Awaitable[Scores]], weight: float = 1.0, name: str | None = None
    ) -> None:
        self.function = import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise TypeError(
                f"a reward must be a Reward, a function or an import path, got {self.function!r} "
                f"of type {type(self.function).__name__}"
            )
        super().__init__(weight, name or _function_name(self.function))
        self._accepted = _accepted_arguments(self.function)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if self._accepted is not None:
            arguments = {name: values for name, values in arguments.items() if name in self._accepted}
        return self.function(**arguments)


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
            raise
        raise ValueError(
            f"reward function {path!r}: there is no module {error.name!r}; expected 'package.module.function' with "
            f"the package installed or its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    found = f"a {type(function).__name__}" if hasattr(module, function_name) else "no such name"
    raise ValueError(
        f"reward function {path!r}: expected a function {function_name!r} in module {module_name!r}, found {found}"
    )


def _function_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or snake_case(type(function).__name__)
    return name.strip("<>")  # "<lambda>"


def _accepted_arguments(function: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments that `function` takes; `None` when it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
