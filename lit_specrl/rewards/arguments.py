"""What a function can be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def required_arguments(function: Callable[..., Any], num_given: int = 0, follow_wrapped: bool = True) -> set[str]:
    """Names of the arguments that a call of `function` must give.

    Args:
        function: anything that can be called.
        num_given: arguments that are given by their place, and not counted.
        follow_wrapped: look through decorators that name what they wrap (`functools.wraps`).

    Example:
        >>> sorted(required_arguments(lambda completions, gold, level=1, **columns: []))
        ['completions', 'gold']
    """
    try:
        parameters = list(inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values())[num_given:]
    except (TypeError, ValueError):  # builtins without a signature
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name for each in parameters if each.kind in named and each.default is each.empty}


def takes_argument(function: Callable[..., Any], name: str, follow_wrapped: bool = True) -> bool:
    """Whether a call of `function` may give this argument by its name; arguments as those of `required_arguments`.

    Example:
        >>> takes_argument(lambda completions, gold: [], "answer"), takes_argument(lambda **columns: [], "answer")
        (False, True)
    """
    try:
        parameters = inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return True
    return any(each.kind is each.VAR_KEYWORD or each.name == name for each in parameters)
