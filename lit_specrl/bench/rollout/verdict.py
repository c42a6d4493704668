"""Whether the callbacks pay, in one sentence."""

from __future__ import annotations

import math

from lit_specrl.bench.rollout.intervals import Interval
from lit_specrl.bench.rollout.paired import COSTS, MEAN, Comparison

ENOUGH_SEEDS = 3
"""Fewer say nothing about the spread."""


def verdict(comparison: Comparison, callbacks: str, cost: str, margin: float) -> str:
    """ "pays", "does not pay" or "cannot tell yet", and why.

    The callbacks pay if they lose no more than the margin of the score and save cost, and both with 95 % confidence.
    They do not pay if they certainly lose more, or certainly save nothing. Where a score was asked for, and all runs
    reach it, the cost until then decides alone: it holds both.

    Args:
        comparison: of the pairs.
        callbacks: their names.
        cost: a key of `COSTS`.
        margin: score that may be lost at equal steps, in the mean over the validations.

    Returns:
        One sentence.
    """
    to_score = comparison.ratios_to_score.get(cost)
    if to_score is not None and not comparison.num_unreached:
        part = f"{COSTS[cost][0]} to the score, without / with, are {to_score.text('{:.2f}x')}"
        return _sentence(callbacks, _sign(to_score.low > 1, to_score.high <= 1), part, to_score.num_seeds)
    saved, lost = comparison.ratios.get(cost), comparison.differences.get(MEAN)
    if saved is None:
        return f"{callbacks}: cannot tell yet: the runs do not say what they cost in {COSTS[cost][0]}."
    part = f"{COSTS[cost][0]}, without / with, are {saved.text('{:.2f}x')}"
    if lost is None:
        pays = _sign(False, saved.high <= 1)
        return _sentence(callbacks, pays, f"{part}, but no validation tells what was learned", saved.num_seeds)
    pays = _sign(lost.low >= -margin and saved.low > 1, lost.high < -margin or saved.high <= 1)
    part += f"; the score at equal steps changes by {lost.text('{:+.3f}')}, {margin:g} may be lost"
    needed = seeds_needed(lost, margin) if margin else None
    if pays == "cannot tell yet" and lost.num_seeds >= ENOUGH_SEEDS and needed is not None and needed > lost.num_seeds:
        part += f", and about {needed} seeds tell so small a change"
    return _sentence(callbacks, pays, part, saved.num_seeds)


def seeds_needed(interval: Interval, half_width: float) -> int | None:
    """Seeds after which the interval would have this half-width, if the spread stays as it is; `None` for one seed.

    Example:
        >>> seeds_needed(Interval(10, 0.0, -0.02, 0.02), 0.01)
        40
    """
    if not math.isfinite(interval.half_width):
        return None
    return max(interval.num_seeds, math.ceil(interval.num_seeds * (interval.half_width / half_width) ** 2))


def _sign(pays: bool, does_not: bool) -> str:
    return "pays" if pays else "does not pay" if does_not else "cannot tell yet"


def _sentence(callbacks: str, pays: str, why: str, num_seeds: int) -> str:
    if num_seeds < ENOUGH_SEEDS:
        pays = "cannot tell yet"
        why += f"; {ENOUGH_SEEDS} seeds are the least that can tell"
    return f"{callbacks}: {pays}: {why} (95 % intervals, {num_seeds} seed{'s' * (num_seeds > 1)})."
