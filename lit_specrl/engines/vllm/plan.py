"""What an engine is given of a device, decided from what the run will do."""

from __future__ import annotations

from typing import Literal

SleepLevel = Literal[0, 1, 2]

_MOST_ROWS = 1024  # decoded at once on a GPU; more only wait for its memory
_MOST_ROWS_ON_CPU = 256
_UNKNOWN_ROWS = 256
_ROWS_MULTIPLE = 8
_ACTIVATIONS = 0.15  # of the device, for what nobody knows before: activations, logits, fragments


def rows_at_once(num_rows: int | None, on_gpu: bool) -> int:
    """Most responses to decode at once, for requests of so many rows.

    Example:
        >>> rows_at_once(60, on_gpu=True), rows_at_once(5000, on_gpu=True), rows_at_once(None, on_gpu=False)
        (64, 1024, 256)
    """
    rows = -(-(num_rows or _UNKNOWN_ROWS) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    return min(rows, _MOST_ROWS if on_gpu else _MOST_ROWS_ON_CPU)


def sleep_level(
    engine_bytes: int, training_bytes: int | None, device_bytes: int, weights_are_handed_over: bool
) -> SleepLevel:
    """How deep an engine on a GPU must sleep while the policy trains.

    Args:
        engine_bytes: what it holds awake.
        training_bytes: what training holds on the device, activations not counted; `None` where nobody has said.
        device_bytes: of the device.
        weights_are_handed_over: the policy's weights come before every rollout that follows an update.

    Returns:
        0 where both fit beside each other with room for activations. Otherwise 2, which drops the weights, or 1, which
        moves them to the host, where they are not handed over.

    Example: on 80 GB, an engine of 40 stays awake beside 20, and not beside 35:

        >>> [sleep_level(40, training, 80, weights_are_handed_over=True) for training in (20, 35)]
        [0, 2]
    """
    if training_bytes is not None and engine_bytes + training_bytes <= (1 - _ACTIVATIONS) * device_bytes:
        return 0
    return 2 if weights_are_handed_over else 1
