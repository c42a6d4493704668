"""`lit-specrl bench rollout`: its options, and the files that it writes. Nothing heavy is imported for its help."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lit_specrl.cli.configuration_files import sources
from lit_specrl.cli.quick_check import check_quickly


def rollout(
    fit_arguments: Sequence[str],
    without: str,
    seeds: str = "0,1,2",
    score: float | None = None,
    output: str = "bench_rollout",
    cost: Literal["seconds", "rollout_seconds", "tokens", "decode_steps"] = "seconds",
    margin: float = 0.01,
    arms: str | None = None,
) -> Any:
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

    The first note is the verdict: whether the callbacks pay, do not pay, or cannot be told yet. It rests
    on the table of paired differences, whose 95 % intervals are those of Student's t over the seeds. They
    pay if they lose at most --margin of the validation score at equal steps and save cost.

    With --arms the callbacks in question are also tried with other arguments, against the same runs without them.
    The table of arms and `frontier.png` tell for each what it saves and what it costs in learning.

    The folder holds each run's configuration, output and `run.json` with the numbers of every step, and
    at the end `report.json` and `report.png` (with matplotlib). Finished runs are not repeated by the
    same command. Logs go there as well, unless the configuration names another place. Runs save no
    checkpoints, unless the configuration asks for them.

    Args:
        fit_arguments: configurations and options of `lit-specrl fit`.
        without: callbacks in question, as in PrefixCache,RolloutRecorder. SpeculativeRollout stands for its drafter.
        seeds: seeds, separated by commas; two runs for each.
        score: validation score whose first time is looked for, as in 0.8.
        output: folder of the results.
        cost: what the verdict charges; decode steps are the tokens of each round's longest continuation.
        margin: validation score that may be lost at equal steps.
        arms: YAML file with arguments of the callbacks for each further arm, by its name, as recipes/arms/reuse.yaml

    Returns:
        A `RolloutReport`, whose module imports torch.

    Raises:
        ValueError: an unknown callback, wrong seeds, a file without arms, or a folder with runs of other settings.
        RunFailedError: a run failed.
    """
    names, numbers = _names(without), _seeds(seeds)
    if not margin >= 0:
        raise ValueError(f"--margin must not be negative, got {margin}")
    if fit_arguments:
        check_quickly("fit", sources(fit_arguments))
    from lit_specrl.bench.rollout.benchmark import bench_rollout

    signal.signal(signal.SIGTERM, _stop)
    try:
        report = bench_rollout(
            fit_arguments, names, numbers, score, Path(output), cost, margin, Path(arms) if arms else None
        )
    except KeyboardInterrupt:
        message = "interrupted. Finished runs are kept: the same command goes on after them"
        raise SystemExit(f"lit-specrl bench rollout: {message}") from None
    (Path(output) / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    return report


def _stop(number: int, frame: object) -> None:
    """End by an exception, which takes the present run along."""
    raise SystemExit(128 + number)


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
