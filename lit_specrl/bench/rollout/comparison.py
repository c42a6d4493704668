"""What the runs say about the callbacks: the arithmetic of the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_specrl.bench.report import Ratio
from lit_specrl.bench.rollout.records import RunRecord, StepRecord

Row = dict[str, Any]

NOT_REACHED = "not reached"
SCORE = "val_accuracy"

_PARTS: dict[str, Callable[[StepRecord], float]] = {
    "generation": lambda step: step.generation_s,
    "generation + verification": lambda step: step.generation_s + step.verification_s,
    "end to end": lambda step: step.wall_s,
}


class Pair(NamedTuple):
    """The two runs of a seed."""

    seed: int
    without: RunRecord
    with_callbacks: RunRecord

    @property
    def num_steps(self) -> int:
        """Steps that both have."""
        return min(len(self.without.steps), len(self.with_callbacks.steps))

    @property
    def windows(self) -> dict[str, slice]:
        """The steps that are compared, the same ones of both runs."""
        start = max(len(_first_epoch(run)) for run in (self.without, self.with_callbacks))
        return {"all": slice(0, self.num_steps), "after the first epoch": slice(start, self.num_steps)}


def ratio_table(pairs: Sequence[Pair]) -> list[Row]:
    """Seconds without the callbacks divided by seconds with them, spread over the seeds; above 1 the callbacks save
    time.

    A window that no seed has steps in has no rows.
    """
    rows = []
    for part, seconds in _PARTS.items():
        for window in ("all", "after the first epoch"):
            ratios = []
            for pair in pairs:
                cut = pair.windows[window]
                without, with_callbacks = pair.without.steps[cut], pair.with_callbacks.steps[cut]
                if without:
                    ratios.append(sum(map(seconds, without)) / sum(map(seconds, with_callbacks)))
            if ratios:
                rows.append(
                    {
                        "without_over_with": part,
                        "steps": window,
                        "min": Ratio(min(ratios)),
                        "median": Ratio(statistics.median(ratios)),
                        "max": Ratio(max(ratios)),
                    }
                )
    return rows


def time_table(pairs: Sequence[Pair]) -> list[Row]:
    """Where the time of each run went, in seconds over all its steps."""
    return [
        {
            **label,
            "steps": len(run.steps),
            "gen_s": sum(step.generation_s for step in run.steps),
            "verify_s": sum(step.verification_s for step in run.steps),
            "end_to_end_s": run.training_s,
            "rollout_fraction": rollout_fraction(run),
        }
        for label, run in _labelled(pairs)
    ]


def rollout_table(pairs: Sequence[Pair]) -> list[Row]:
    """What the rollouts of each run were."""
    return [
        {
            **label,
            "generated_tokens": (generated := sum(step.generated_tokens for step in run.steps)),
            "reuse_fraction": 1 - generated / sum(step.response_tokens for step in run.steps),
            "reward_first_epoch": _mean_reward(_first_epoch(run)),
            "reward_last_epoch": _mean_reward(_epoch(run, run.steps[-1].epoch)),
        }
        for label, run in _labelled(pairs)
    ]


def validation_table(pairs: Sequence[Pair], score: float | None) -> list[Row]:
    """How well each run did on validation data, whose rollouts are always fresh; empty where no run has any.

    Args:
        score: also tell when a validation first reached it, if it is given.
    """
    rows = []
    for label, run in _labelled(pairs):
        scores = [evaluation.metrics[SCORE] for evaluation in run.evaluations if SCORE in evaluation.metrics]
        if not scores:
            continue
        row: Row = {**label, "validation_first": scores[0], "validation_last": scores[-1]}
        if score is not None:
            row |= _reached(run, score)
        rows.append(row)
    return rows


def rollout_fraction(run: RunRecord) -> float:
    """Share of generation and verification in the training time."""
    return sum(step.generation_s + step.verification_s for step in run.steps) / run.training_s


def notes(pairs: Sequence[Pair], callbacks: str, score: float | None) -> list[str]:
    """What the reader must know about the tables."""
    fraction = statistics.median(rollout_fraction(pair.without) for pair in pairs)
    found = [
        f"Without {callbacks}, rollouts take {fraction:.0%} of the training time (all steps, median over the seeds); "
        f"savings there alone cannot bring the ratio end to end above {1 / (1 - fraction):.2f}x."
    ]
    if score is not None and not validation_table(pairs, score):
        found.append(f"No validation reports {SCORE}, so that nothing is said about --score {score:g}.")
    return found


def weaknesses(pairs: Sequence[Pair]) -> list[str]:
    """What makes ratios and differences weak, or meaningless."""
    runs = [run for _, run in _labelled(pairs)]
    found = []
    if len(pairs) == 1:
        found.append("One seed says nothing about the spread; take several with --seeds.")
    if not any(pair.num_steps > pair.windows["after the first epoch"].start for pair in pairs):
        found.append(
            "No step comes after the first epoch, in which there is nothing to reuse: the ratios tell nothing of "
            "reuse; raise trainer.max_epochs."
        )
    if any(len(pair.without.steps) != len(pair.with_callbacks.steps) for pair in pairs):
        found.append("The two runs of a seed differ in their number of steps; ratios are of the steps that both have.")
    if len({(run.hardware, run.torch_version) for run in runs}) > 1:
        found.append("The runs were made on different machines or versions of torch: the ratios mean little.")
    return found


def _labelled(pairs: Sequence[Pair]) -> list[tuple[Row, RunRecord]]:
    return [
        ({"seed": pair.seed, "run": name}, run)
        for pair in pairs
        for name, run in (("without", pair.without), ("with", pair.with_callbacks))
    ]


def _reached(run: RunRecord, score: float) -> Row:
    for evaluation in run.evaluations:
        if evaluation.metrics.get(SCORE, float("-inf")) >= score:
            return {"steps_to_score": evaluation.step, "seconds_to_score": evaluation.training_s}
    return {"steps_to_score": NOT_REACHED, "seconds_to_score": NOT_REACHED}


def _epoch(run: RunRecord, epoch: int) -> list[StepRecord]:
    return [step for step in run.steps if step.epoch == epoch]


def _first_epoch(run: RunRecord) -> list[StepRecord]:
    return _epoch(run, run.steps[0].epoch)


def _mean_reward(steps: Sequence[StepRecord]) -> float:
    return statistics.fmean(step.metrics["reward"] for step in steps)
