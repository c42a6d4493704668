"""What a checkpoint may hold, so that it can be loaded again."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

_LEAVES = (torch.Tensor, torch.nn.Parameter, str, int, float, bool, bytes, type(None))


def loadable(content: Any, path: str = "") -> Any:
    """The content with numbers of numpy made numbers of Python, if `torch.load(..., weights_only=True)` reads the rest.

    Containers that hold nothing to change are returned themselves.

    Args:
        content: of a checkpoint.
        path: where in the checkpoint it lies, such as "callbacks.Mine.best".

    Raises:
        TypeError: something that would make the checkpoint unreadable; the message names its place and type.

    Example:
        >>> loadable({"best": np.float64(0.5), "steps": [1, 2]})
        {'best': 0.5, 'steps': [1, 2]}
    """
    kind = type(content)
    if kind in _LEAVES:
        return content
    if isinstance(content, np.generic) and type(content.item()) in _LEAVES:  # not so for dates, for example
        return content.item()
    if kind in (dict, OrderedDict):
        return _loadable_mapping(content, path)
    if kind in (list, tuple, set):
        parts = [loadable(part, _join(path, index)) for index, part in enumerate(content)]
        changed = any(new is not old for new, old in zip(parts, content, strict=True))
        return kind(parts) if changed else content
    try:
        _load_alone(content)
    except Exception as error:  # whatever pickle meets in somebody's class
        raise TypeError(
            f"{path or 'the checkpoint'} holds a {kind.__module__}.{kind.__qualname__}, with which the checkpoint "
            "could not be loaded again. Checkpoints hold tensors, strings, numbers, None and lists, tuples, sets or "
            f"dicts of them: {_advice(content)}"
        ) from error
    return content


def _loadable_mapping(content: dict[Any, Any], path: str) -> dict[Any, Any]:
    changed = {}
    for key, value in content.items():
        place = _join(path, key)
        new_key, new_value = loadable(key, f"a key of {path or 'the checkpoint'}"), loadable(value, place)
        if new_key is not key or new_value is not value:
            changed[key] = new_key, new_value
    if not changed:
        return content  # as it is: the state of a module has attributes of its own
    return type(content)(changed.get(key, (key, value)) for key, value in content.items())


def _join(path: str, part: Any) -> str:
    return f"{path}.{part}" if path else str(part)


def _load_alone(content: Any) -> None:
    """Write and read it, by the rules of torch itself."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(str(error)) from error


def _advice(content: Any) -> str:
    if isinstance(content, np.ndarray):
        return "save torch.from_numpy(array) or array.tolist() instead"
    if callable(content):
        return "leave it out of the state, or out of save_hyperparameters() by ignore=[...]"
    return "save what it consists of instead"
