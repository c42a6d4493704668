"""Adding up statistics of several rounds or ranks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any, TypeVar

S = TypeVar("S", bound=Any)


def total(parts: Iterable[S]) -> S:
    """The sum of at least one statistics object; unlike `sum`, it needs no zero to begin with.

    Example:
        >>> total([[1], [2, 3]])
        [1, 2, 3]
    """
    return reduce(lambda first, second: first + second, parts)
