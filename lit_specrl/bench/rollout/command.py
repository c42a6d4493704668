"""`lit-specrl bench rollout`: the runs one after the other, then the report."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
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
from lit_specrl.bench.rollout.records import RunRecord
from lit_specrl.bench.rollout.runs import planned_runs
from lit_specrl.cli.fit_config import Configuration, fit_configuration


@dataclass(frozen=True)
class RolloutReport(Report):
    """The comparison, with everything it was computed from."""

    configuration: Configuration = field(default_factory=dict)
    """Of the runs with the callbacks; seeds are those of each run."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Seed, arm and `RunRecord` of each run."""


def bench_rollout(
    fit_arguments: Sequence[str], without: Sequence[str], seeds: Sequence[int], score: float | None, output: Path
) -> RolloutReport:
    """Train with and without callbacks, and compare time, tokens and what was learned.

    Every run is `lit-specrl fit` with the given configuration, in a process of its own. The two runs
    of a seed see the same prompts in the same order with the same seeds; which of them comes first
    alternates from seed to seed. Without `SpeculativeRollout` means without its drafter, by the same engine.
    Validation, the start of the engine and everything before the first
    step (imports, loading the model) count nowhere. The first steps, in which memory is touched and
    kernels are compiled for the first time, are slow with and without the callbacks alike and pull the
    ratios towards 1; the rows "after the first epoch" are free of them.

    Three ratios of seconds without / with the callbacks are always told together: generation alone,
    generation and verification, and end to end, which is the whole time from the first step to the end
    of training.

    The folder holds each run's configuration, output and `run.json` with the numbers of every step, and
    at the end `report.json` and `report.png` (with matplotlib). Finished runs are not repeated by the
    same command. Logs go there as well, unless the configuration names another place. Runs save no
    checkpoints, unless the configuration asks for them.

    Args:
        fit_arguments: configs and overrides, as for `lit-specrl fit`.
        without: class names of the callbacks in question, as in `trainer.callbacks`. `SpeculativeRollout` stands for its drafter.
        seeds: each one replaces the seeds of the module, of the data module and of the global generators.
        score: validation score whose first time is looked for.
        output: folder; made if it is not there.

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
    return _report(configuration, pairs, fit_arguments, without, score, output)


def _report(
    configuration: Configuration,
    pairs: Sequence[Pair],
    fit_arguments: Sequence[str],
    without: Sequence[str],
    score: float | None,
    output: Path,
) -> RolloutReport:
    names = ", ".join(without)
    remarks = notes(pairs, names, score)
    try:
        draw(pairs, names, output / "report.png")
    except ImportError as error:
        remarks.append(str(error))
    tables = {
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


# -------------------------------------------------------------------------------------------------------- command line


def rollout_command(arguments: list[str]) -> None:
    """`lit-specrl bench rollout --config FILE --without NAMES [options of the benchmark and of fit]`."""
    options, fit_arguments = _parser().parse_known_args(
        arguments
    )  # jsonargparse could not leave the options of `fit` over
    signal.signal(signal.SIGTERM, _stop)
    try:
        report = bench_rollout(
            fit_arguments,
            without=_names(options.without),
            seeds=_seeds(options.seeds),
            score=options.score,
            output=Path(options.output),
        )
    except KeyboardInterrupt:
        message = "interrupted. Finished runs are kept: the same command goes on after them"
        raise SystemExit(f"lit-specrl bench rollout: {message}") from None
    (Path(options.output) / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    report.print()


def _stop(number: int, frame: object) -> None:
    """End by an exception, which takes the present run along."""
    raise SystemExit(128 + number)


def _parser() -> ArgumentParser:
    assert bench_rollout.__doc__ is not None
    description, _, _ = bench_rollout.__doc__.partition("\n\n    Args:")
    parser = ArgumentParser(
        prog="lit-specrl bench rollout",
        usage="%(prog)s --config FILE [--config FILE ...] --without NAMES [options] [options of lit-specrl fit]",
        description=description.replace("\n    ", "\n"),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed_everything is of `fit`
    )
    parser.add_argument("--without", required=True, help="callbacks in question, as in PrefixCache,RolloutRecorder")
    parser.add_argument(
        "--seeds", default="0,1,2", help="seeds, separated by commas; two runs for each (default: 0,1,2)"
    )
    parser.add_argument("--score", type=float, help="validation score whose first time is looked for, as in 0.8")
    parser.add_argument("--output", default="bench_rollout", help="folder of the results (default: bench_rollout)")
    return parser


def _names(without: str) -> list[str]:
    names = [name.strip() for name in without.split(",")]
    if not all(names):
        raise ValueError(f"--without must be class names such as PrefixCache,RolloutRecorder, got {without!r}")
    return names


def _seeds(seeds: str) -> list[int]:
    values = [value.strip() for value in seeds.split(",")]
    if not all(value.isdecimal() for value in values) or len(set(values)) < len(values):
        raise ValueError(f"--seeds must be different whole numbers such as 0,1,2, got {seeds!r}")
    return [int(value) for value in values]
