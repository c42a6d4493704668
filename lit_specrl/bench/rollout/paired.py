"""Paired differences: what the callbacks save and what they cost in learning, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lit_specrl.bench.report import Ratio
from lit_specrl.bench.rollout.comparison import SCORE, Pair
from lit_specrl.bench.rollout.intervals import Interval, mean_interval, ratio_interval
from lit_specrl.bench.rollout.records import RunRecord, StepRecord

LAST, MEAN = "score, last validation", "score, mean of validations"
COSTS: dict[str, tuple[str, Callable[[StepRecord], float | None]]] = {
    "seconds": ("seconds end to end", lambda step: step.wall_s),
    "rollout_seconds": ("seconds of generation + verification", lambda step: step.generation_s + step.verification_s),
    "tokens": ("generated tokens", lambda step: step.generated_tokens),
    "decode_steps": ("decode steps", lambda step: step.decode_steps),
}
"""What a run may be charged by: how it is called in the table, and the cost of a step."""


@dataclass(frozen=True)
class Comparison:
    """Intervals over the seeds. What no pair tells is missing."""

    differences: dict[str, Interval] = field(default_factory=dict)
    """`LAST` and `MEAN`: score with the callbacks - score without them, at equal steps."""
    ratios: dict[str, Interval] = field(default_factory=dict)
    """By cost: without the callbacks / with them, over the steps that both runs have; above 1 they save."""
    ratios_to_score: dict[str, Interval] = field(default_factory=dict)
    """The same until the score was reached, of the pairs in which both runs reach it."""
    num_unreached: int = 0
    """Pairs in which one of the runs, or both, has not reached the score or had it in its first validation."""

    def table(self, score: float | None) -> list[dict[str, Any]]:
        """Rows for the report."""
        until = "" if score is None else f" to {score:g}"
        rows = [_row(f"{name}, with - without", each, float) for name, each in self.differences.items()]
        rows += [_row(f"{COSTS[name][0]}, without / with", each, Ratio) for name, each in self.ratios.items()]
        for name, each in self.ratios_to_score.items():
            rows.append(_row(f"{COSTS[name][0]}{until}, without / with", each, Ratio))
        return rows


def _row(name: str, interval: Interval, kind: type[float]) -> dict[str, Any]:
    bounds = {"low_95": interval.low, "high_95": interval.high}
    return {
        "paired": name,
        "seeds": interval.num_seeds,
        "mean": kind(interval.mean),
        **{bound: kind(value) if interval.is_bounded else None for bound, value in bounds.items()},
    }


def compare(pairs: Sequence[Pair], score: float | None = None) -> Comparison:
    """Compare the two runs of each seed.

    Args:
        pairs: one for each seed.
        score: validation score to reach, for the costs until then.
    """
    scores = [common for pair in pairs if (common := _common_scores(pair))]
    differences = {
        LAST: [with_callbacks[-1] - without[-1] for without, with_callbacks in scores],
        MEAN: [sum(with_callbacks) / len(without) - sum(without) / len(without) for without, with_callbacks in scores],
    }
    return Comparison(
        differences={name: mean_interval(values) for name, values in differences.items() if values},
        ratios=_ratios(pairs, lambda pair, run, cost: _total(run.steps[: pair.num_steps], cost)),
        ratios_to_score={} if score is None else _ratios(pairs, lambda _, run, cost: cost_to_score(run, cost, score)),
        num_unreached=0
        if score is None
        else sum(None in [cost_to_score(run, COSTS["tokens"][1], score) for run in pair[1:]] for pair in pairs),
    )


def cost_to_score(run: RunRecord, cost: Callable[[StepRecord], float | None], score: float) -> float | None:
    """What a run has cost when its validations first reached a score, on straight lines between them.

    Args:
        run: the run.
        cost: of a step; `None` where it is not known.
        score: the score.

    Returns:
        `None` if the score was not reached, the first validation has it already, or the cost is not known.
    """
    points = [
        (_total(run.steps[: evaluation.step], cost), evaluation.metrics[SCORE])
        for evaluation in run.evaluations
        if SCORE in evaluation.metrics
    ]
    if points and points[0][1] >= score:
        return None
    for (cost_before, before), (cost_after, after) in pairwise(points):
        if before < score <= after and cost_before is not None and cost_after is not None:
            return cost_before + (cost_after - cost_before) * (score - before) / (after - before)
    return None


def _common_scores(pair: Pair) -> tuple[list[float], list[float]] | None:
    """Scores of the validations after the same steps, but for that before the first step."""
    without, with_callbacks = (
        {
            evaluation.step: evaluation.metrics[SCORE]
            for evaluation in run.evaluations
            if evaluation.step and SCORE in evaluation.metrics
        }
        for run in (pair.without, pair.with_callbacks)
    )
    steps = [step for step in without if step in with_callbacks]
    return ([without[step] for step in steps], [with_callbacks[step] for step in steps]) if steps else None


def _ratios(
    pairs: Sequence[Pair], cost_of: Callable[[Pair, RunRecord, Callable[[StepRecord], float | None]], float | None]
) -> dict[str, Interval]:
    """By cost; pairs without it are left out, and costs without a pair."""
    found = {}
    for name, (_, cost) in COSTS.items():
        both = [(cost_of(pair, pair.without, cost), cost_of(pair, pair.with_callbacks, cost)) for pair in pairs]
        ratios = [without / with_callbacks for without, with_callbacks in both if without and with_callbacks]
        if ratios:
            found[name] = ratio_interval(ratios)
    return found


def _total(steps: Sequence[StepRecord], cost: Callable[[StepRecord], float | None]) -> float | None:
    """Sum over steps; `None` where one of them does not know."""
    costs = [cost(step) for step in steps]
    return None if None in costs else float(sum(value for value in costs if value is not None))
