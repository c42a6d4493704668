"""Means over seeds, and how far they may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]


class Interval(NamedTuple):
    """A mean over seeds with its 95 % confidence interval."""

    num_seeds: int
    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_bounded(self) -> bool:
        """False for a single seed, and where two differ beyond measure."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def text(self, number: str) -> str:
        """Mean and bounds, where there are any; `number` formats each, as "{:.2f}x" does."""
        mean, low, high = (number.format(value) for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})" if self.is_bounded else mean


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of one value for each seed, by Student's t; a single seed bounds nothing.

    Args:
        values: one for each seed, at least one.

    Example:
        >>> mean_interval([0.0, 2.0])
        Interval(num_seeds=2, mean=1.0, low=-11.706, high=13.706)
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(1, mean, -math.inf, math.inf)
    margin = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(len(values), mean, mean - margin, mean + margin)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """Geometric mean and 95 % interval of one ratio for each seed: half and twice as much cancel out.

    Args:
        ratios: positive, one for each seed.

    Example:
        >>> round(ratio_interval([0.5, 2.0]).mean, 6)
        1.0
    """
    logs = mean_interval([math.log(ratio) for ratio in ratios])
    return Interval(logs.num_seeds, *(_exp(value) for value in logs[1:]))


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; beyond 30 degrees of freedom good to three digits."""
    return _QUANTILES[degrees - 1] if degrees <= len(_QUANTILES) else 1.96 + 2.4 / degrees


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # two seeds that differ much bound nothing
        return math.inf
