"""`lit-specrl bench NAME`: one subcommand per benchmark, whose options are the arguments of its function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from lit_specrl.bench.logprobs import bench_logprobs
from lit_specrl.bench.math_reward import bench_math_reward
from lit_specrl.bench.prefix_cache import bench_prefix_cache
from lit_specrl.bench.report import Report
from lit_specrl.bench.rollout.command import bench_rollout, rollout_command
from lit_specrl.bench.shared_prompts import bench_shared_prompts
from lit_specrl.bench.speculation import bench_speculation
from lit_specrl.bench.weight_sync import bench_weight_sync

BENCHMARKS: dict[str, Callable[..., Report]] = {
    "logprobs": bench_logprobs,
    "math-reward": bench_math_reward,
    "prefix-cache": bench_prefix_cache,
    "shared-prompts": bench_shared_prompts,
    "speculation": bench_speculation,
    "weight-sync": bench_weight_sync,
}


def bench_command(arguments: list[str]) -> None:
    """`lit-specrl bench NAME [options] [--json FILE]`; without a name, `rollout`."""
    if arguments[:1] == ["rollout"]:
        return rollout_command(arguments[1:])  # takes the options of `lit-specrl fit` as well
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        return rollout_command(arguments)
    options = _parser().parse_args(arguments)
    name = options.subcommand
    settings = options[name].as_dict()
    json_file = settings.pop("json")
    try:
        if json_file is not None:
            _check_writable(Path(json_file))
        report = BENCHMARKS[name](**settings)
    except ValueError as error:
        raise SystemExit(f"lit-specrl bench {name}: {error}") from error
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    report.print()
    if report.failures:
        raise SystemExit(f"lit-specrl bench {name}: " + "; ".join(report.failures))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lit-specrl bench", description="Measure this library on this machine.")
    subcommands = parser.add_subcommands(required=True)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.__doc__ is not None
        options = ArgumentParser(description=benchmark.__doc__.split("\n\n    Args:")[0])
        options.add_function_arguments(benchmark)
        options.add_argument("--json", type=str | None, default=None, help="file for the numbers of the tables.")
        subcommands.add_subcommand(name, options, help=benchmark.__doc__.split("\n")[0])
    assert bench_rollout.__doc__ is not None
    subcommands.add_subcommand("rollout", ArgumentParser(), help=bench_rollout.__doc__.split("\n")[0])
    return parser


def _check_writable(file: Path) -> None:
    """Before minutes are spent on numbers that cannot be kept."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file} is not a file in an existing folder")
