"""The settings of a run as a flat table, for loggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

_PLAIN = (str, int, float, bool)


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a module as numbers and texts.

    Args:
        arguments: by name. Dataclasses and dictionaries become an entry per field, other objects their class with its
            plain attributes, functions their name.

    Example:
        >>> hyperparameters({"beta": 0.1, "lora": {"r": 16}, "top_k": None})
        {'beta': 0.1, 'lora.r': 16, 'top_k': 'none'}
    """
    table: dict[str, Any] = {}
    for name, value in arguments.items():
        table |= _entries(name, value)
    return table


def _entries(name: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        if type(value).__module__.startswith("lit_specrl."):
            return {f"{name}.{part}": _plain(entry) for part, entry in parts.items()}
    if isinstance(value, Mapping):
        return {f"{name}.{part}": _plain(entry) for part, entry in value.items()}
    return {name: _plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if value is None:
        return "none"
    if isinstance(value, partial):
        arguments = [*map(str, value.args), *(f"{name}={entry}" for name, entry in value.keywords.items())]
        return f"{_plain(value.func)}({', '.join(arguments)})"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(str(_plain(entry)) for entry in value)
    if not hasattr(value, "__dict__"):
        return str(value)
    attributes = {name: entry for name, entry in vars(value).items() if not name.startswith("_")}
    shown = [f"{name}={entry}" for name, entry in attributes.items() if entry is None or isinstance(entry, _PLAIN)]
    return f"{type(value).__name__}({', '.join(shown)})"
