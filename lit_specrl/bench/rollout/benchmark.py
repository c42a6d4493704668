"""Runs with and without callbacks, one after the other, and the report of what they took."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_specrl.bench.report import Report
from lit_specrl.bench.rollout.arms import arms_table, further_arms
from lit_specrl.bench.rollout.comparison import (
    Pair,
    notes,
    ratio_table,
    rollout_table,
    time_table,
    validation_table,
    weaknesses,
)
from lit_specrl.bench.rollout.figure import draw, draw_frontier
from lit_specrl.bench.rollout.paired import compare
from lit_specrl.bench.rollout.records import RunRecord
from lit_specrl.bench.rollout.runs import WITH, WITHOUT, planned_runs
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
    arms: Path | None = None,
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
        arms: file with other arguments of the callback (`further_arms`).

    Raises:
        ValueError: an unknown callback, a file without arms, or a folder with runs of other settings.
        RunFailedError: a run failed.
    """
    configuration = fit_configuration(fit_arguments)
    more = further_arms(configuration, without, arms) if arms else {}
    runs = planned_runs(configuration, without, seeds, output, more)
    records: dict[tuple[int, str], RunRecord] = {}
    finished = [run.finished() for run in runs]  # of all, so that a wrong folder is refused before anything runs
    for number, (run, record) in enumerate(zip(runs, finished, strict=True), start=1):
        arm = f"{run.arm} {', '.join(without)}" if run.arm in (WITHOUT, WITH) else f"{', '.join(without)} {run.arm!r}"
        label = f"run {number} of {len(runs)}: seed {run.seed}, {arm}"
        print(f"{label}, {'found in' if record else 'into'} {run.folder}", file=sys.stderr)
        records[run.seed, run.arm] = record or run.execute()
    pairs = {arm: [Pair(seed, records[seed, WITHOUT], records[seed, arm]) for seed in seeds] for arm in (WITH, *more)}
    return _report(configuration, pairs, fit_arguments, without, score, output, cost, margin)


def _report(
    configuration: Configuration,
    pairs_by_arm: Mapping[str, Sequence[Pair]],
    fit_arguments: Sequence[str],
    without: Sequence[str],
    score: float | None,
    output: Path,
    cost: str,
    margin: float,
) -> RolloutReport:
    names, pairs = ", ".join(without), pairs_by_arm[WITH]
    comparisons = {arm: compare(of_arm, score) for arm, of_arm in pairs_by_arm.items()}
    comparison = comparisons[WITH]
    remarks = [verdict(comparison, names, cost, margin), *notes(pairs, names, score)]
    try:
        draw(pairs, names, output / "report.png")
        if len(comparisons) > 1:
            draw_frontier(comparisons, cost, output / "frontier.png")
    except ImportError as error:
        remarks.append(str(error))
    tables = {
        "paired": comparison.table(score),
        "arms": arms_table(comparisons, cost, score) if len(comparisons) > 1 else [],
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
        warnings={title: weaknesses(pairs) for title in ("paired", "arms", "compared") if tables[title]},
        configuration=configuration,
        runs=[
            {"seed": pair.seed, "arm": arm, **asdict(record)}
            for of_arm, of_seeds in pairs_by_arm.items()
            for pair in of_seeds
            for arm, record in ((WITHOUT, pair.without), (of_arm, pair.with_callbacks))
            if arm == of_arm or of_arm == WITH  # the runs without are the same in all arms
        ],
    )
