"""Sums, means and padding of ragged rows that live in a rectangle.

In every function `mask` is bool and True marks the entries that count. What stands under False never matters, NaN and
infinity included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Sum of the entries where `mask` is True.

    Args:
        values: any shape.
        mask: bool, shape of `values`.
        dim: dimension to sum over; `None` sums everything.
        keepdim: keep the summed dimension with length 1; needs `dim`.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    kept = values.masked_fill(~mask, 0)  # not values * mask: NaN * 0 is NaN
    return kept.sum() if dim is None else kept.sum(dim, keepdim=keepdim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Mean of the entries where `mask` is True: divides by the number of True entries along `dim`.

    Where nothing is True the mean is 0, with zero gradient. A mean over micro-batches or ranks is not the mean of
    these means: add the sums and the counts instead.

    Args:
        values: any shape.
        mask: bool, shape of `values`.
        dim: dimension to average over; `None` averages everything.
        keepdim: keep the averaged dimension with length 1; needs `dim`.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]]), dim=-1)
        tensor([2., 0.])
    """
    count = mask.sum() if dim is None else mask.sum(dim, keepdim=keepdim)
    return masked_sum(values, mask, dim, keepdim) / count.clamp(min=1)


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, add_up: Callable[[Tensor], Tensor] = lambda total: total
) -> Tensor:
    """Scale the True entries to variance 1 and, with `shift_mean`, to mean 0; the others become 0.

    Numbers are those of verl's `masked_whiten`: unbiased variance, 1e-8 added to it. Where verl raises (fewer than two
    True entries) the variance counts as 0.

    Args:
        values: any shape.
        mask: bool, shape of `values`.
        shift_mean: subtract the mean; otherwise the mean is kept as it was.
        add_up: adds a sum to those of other ranks; by default the statistics are of this tensor alone.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    count = add_up(mask.sum())
    mean = add_up(masked_sum(values, mask)) / count.clamp(min=1)
    variance = add_up(masked_sum((values - mean).square(), mask)) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0)


def pad_right(
    rows: Sequence[Sequence[float]],
    padding_value: float = 0,
    dtype: torch.dtype = torch.long,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Put ragged rows into a rectangle, each beginning in the first column.

    Args:
        rows: N lists of numbers; empty ones are fine.
        padding_value: what fills the space after each row.
        dtype: of the result.
        length: columns, L; `None` takes the longest row.

    Returns:
        The values [N, L] and a bool mask [N, L], True on what came from `rows`.

    Raises:
        ValueError: a row is longer than `length`.

    Example:
        >>> values, mask = pad_right([[5, 6], [7]])
        >>> values.tolist(), mask.tolist()
        ([[5, 6], [7, 0]], [[True, True], [True, False]])
    """
    mask = _right_padded_mask(rows, length)
    return _fill(rows, mask, padding_value, dtype), mask


def pad_left(
    rows: Sequence[Sequence[float]],
    padding_value: float = 0,
    dtype: torch.dtype = torch.long,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Put ragged rows into a rectangle, each ending in the last column; otherwise as `pad_right`.

    Example:
        >>> values, mask = pad_left([[5, 6], [7]])
        >>> values.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[True, True], [False, True]])
    """
    mask = _right_padded_mask(rows, length).flip(-1)
    return _fill(rows, mask, padding_value, dtype), mask


def _right_padded_mask(rows: Sequence[Sequence[float]], length: int | None) -> Tensor:
    longest = max((len(row) for row in rows), default=0)
    if length is not None and length < longest:
        raise ValueError(f"length must hold the longest row ({longest} entries), got {length}; cut the rows first")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return torch.arange(longest if length is None else length) < lengths[:, None]  # [N, L]


def _fill(rows: Sequence[Sequence[float]], mask: Tensor, padding_value: float, dtype: torch.dtype) -> Tensor:
    values = torch.full(mask.shape, padding_value, dtype=dtype)
    numbers = np.fromiter(chain.from_iterable(rows), np.float64 if dtype.is_floating_point else np.int64)
    return values.masked_scatter_(mask, torch.from_numpy(numbers).to(dtype))
