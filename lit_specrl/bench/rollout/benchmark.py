"""Runs with and without callbacks, one after the other, and the report of what they took."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_specrl.bench.report import Report
from lit_specrl.bench.rollout.comparison import (
    Pair,
    notes,
    ratio_table,
    rollout_table,
    time_table,
    validation_table,
)
from lit_specrl.bench.rollout.figure import draw
from lit_specrl.bench.rollout.paired import compare
from lit_specrl.bench.rollout.records import RunRecord
from lit_specrl.bench.rollout.runs import planned_runs
from lit_specrl.bench.rollout.verdict import verdict
from lit_specrl.cli.fit_config import Configuration, fit_configuration


@dataclass(frozen=True)
class RolloutReport(Report):
    """The comparison, with everything it was computed from."""

    configuration: Configuration = field(default_factory=dict)
    """Of the runs with the callbacks; seeds are those of each run."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Seed, arm and `RunRecord` of each run."""


def bench_rollout(
    fit_arguments: Sequence[str],
    without: Sequence[str],
    seeds: Sequence[int],
    score: float | None,
    output: Path,
    cost: str = "seconds",
    margin: float = 0.01,
) -> RolloutReport:
    """Train with and without callbacks, and compare time, tokens and what was learned: `lit-specrl bench rollout`.

    Args:
        fit_arguments: configurations and options of `lit-specrl fit`.
        without: class names of the callbacks in question, as in `trainer.callbacks`. `SpeculativeRollout` stands for
            its drafter.
        seeds: each one replaces the seeds of the module, of the data module and of the global generators.
        score: validation score whose first time is looked for.
        output: folder; made if it is not there.
        cost: what the verdict charges, a key of `paired.COSTS`.
        margin: score that the callbacks may cost at equal steps.

    Raises:
        ValueError: an unknown callback, or a folder with runs of other settings.
        RunFailedError: a run failed.
    """
    configuration = fit_configuration(fit_arguments)
    runs = planned_runs(configuration, without, seeds, output)
    records: dict[tuple[int, str], RunRecord] = {}
    finished = [run.finished() for run in runs]  # of all, so that a wrong folder is refused before anything runs
    for number, (run, record) in enumerate(zip(runs, finished, strict=True), start=1):
        label = f"run {number} of {len(runs)}: seed {run.seed}, {run.arm} {', '.join(without)}"
        print(f"{label}, {'found in' if record else 'into'} {run.folder}", file=sys.stderr)
        records[run.seed, run.arm] = record or run.execute()
    pairs = [Pair(seed, records[seed, "without"], records[seed, "with"]) for seed in seeds]
    return _report(configuration, pairs, fit_arguments, without, score, output, cost, margin)


def _report(
    configuration: Configuration,
    pairs: Sequence[Pair],
    fit_arguments: Sequence[str],
    without: Sequence[str],
    score: float | None,
    output: Path,
    cost: str,
    margin: float,
) -> RolloutReport:
    names = ", ".join(without)
    comparison = compare(pairs, score)
    remarks = [verdict(comparison, names, cost, margin), *notes(pairs, names, score)]
    try:
        draw(pairs, names, output / "report.png")
    except ImportError as error:
        remarks.append(str(error))
    tables = {
        "paired": comparison.table(score),
        "compared": ratio_table(pairs),
        "time": time_table(pairs),
        "rollouts": rollout_table(pairs),
        "validation": validation_table(pairs, score),
    }
    return RolloutReport(
        hardware=pairs[0].without.hardware,
        torch_version=pairs[0].without.torch_version,
        settings={
            "benchmark": "rollout",
            "without": ",".join(without),
            "seeds": ",".join(str(pair.seed) for pair in pairs),
            "score": score,
            "cost": cost,
            "margin": margin,
            "fit": " ".join(fit_arguments),
        },
        tables={title: rows for title, rows in tables.items() if rows},
        notes=remarks,
        configuration=configuration,
        runs=[
            {"seed": pair.seed, "arm": arm, **asdict(record)}
            for pair in pairs
            for arm, record in (("without", pair.without), ("with", pair.with_callbacks))
        ],
    )
