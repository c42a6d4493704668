"""How many tokens of each row's draft are worth verifying."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SPREAD = 0.03  # of what a row will still need, as a fraction of the longest


def row_lengths(chances: Floats, weights: Floats, seconds: Floats, margin: float = 0.0) -> NDArray[np.int64]:
    """The length of each row's draft with which the step emits the most weighted tokens per second.

    The chances of a row fall with the position, so that the best M drafted tokens of a step are the M with the highest
    `weight * chance`; M is tried from 0 on. This is the optimum, not an approximation of it. ReSpec (Chen et al. 2025,
    arXiv 2510.26475) solves for one length of all rows; DAS (2025, arXiv 2511.13841) gives longer drafts to longer rows
    by classes.

    Args:
        chances: [N, K] that the k first tokens of each draft are accepted; 0 where there is none.
        weights: [N] worth of a token of each row, see `row_weights`.
        seconds: [N * K + 1] of a step that verifies M drafted tokens, from M = 0 on.
        margin: predicted gain, as a fraction, without which nothing is drafted.

    Returns:
        [N] tokens, 0 to K.

    Example: the second token of the first row is worth more than the first one of the other row:

        >>> chances = np.array([[0.9, 0.8], [0.5, 0.2]])
        >>> row_lengths(chances, np.ones(2), seconds=np.array([1.0, 1.1, 1.2, 1.5, 1.8]))
        array([2, 0])
    """
    value = (chances * weights[:, None]).ravel()
    order = np.argsort(-value, kind="stable")[: np.count_nonzero(value)]
    emitted = weights.sum() + np.append(0.0, value[order].cumsum())  # [M + 1]
    speeds = emitted / seconds[: len(emitted)]
    best = int(speeds.argmax())
    if speeds[best] < speeds[0] * (1 + margin):
        best = 0
    return np.asarray(np.bincount(order[:best] // chances.shape[1], minlength=len(chances)))


def row_weights(remaining: Floats, fixed_fraction: float) -> Floats:
    """Worth of a token of each row, [N], 1 on average.

    A row that is one token further needs one row less in some later step; the fixed part of a step is saved only if the
    row would have been the last one. So a token is worth the row's own part of a step, and of the fixed part as much as
    the row is likely to be the last, which falls by e for each 3 % of the longest rest that it needs less. A row whose
    drafts are accepted gets ahead and needs less: what decides the time are those that lag.

    Args:
        remaining: [N] steps that each row will probably still need; NaN where nothing is known.
        fixed_fraction: part of the time of a step that its first row takes, 0 to 1.

    Example: the second row will run twice as long:

        >>> row_weights(np.array([50.0, 100.0]), fixed_fraction=0.5).round(2)
        array([0.5, 1.5])
    """
    known = ~np.isnan(remaining)
    if not known.any():
        return np.ones(len(remaining))
    rest = np.where(known, remaining, remaining[known].mean())
    is_last = np.exp((rest - rest.max()) / (_SPREAD * max(rest.max(), 1.0)))  # all may be at their ends
    weights: Floats = 1 - fixed_fraction + fixed_fraction * len(rest) * is_last / is_last.sum()
    return weights
