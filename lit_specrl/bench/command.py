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
from lit_specrl.cli.diagnosis import parsed

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
    parsers = _parsers()
    if not arguments or arguments[0] not in parsers:
        _overview(parsers).parse_args(arguments)
    name = arguments[0]
    settings = parsed(parsers[name], arguments[1:]).as_dict()
    json_file = settings.pop("json")
    if json_file is not None:
        _check_writable(Path(json_file))
    report = BENCHMARKS[name](**settings)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    report.print()
    if report.failures:
        raise SystemExit(f"lit-specrl bench {name}: " + "; ".join(report.failures))


def _parsers() -> dict[str, ArgumentParser]:
    """The parser of each benchmark."""
    parsers = {}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.__doc__ is not None
        options = ArgumentParser(
            prog=f"lit-specrl bench {name}",
            description=benchmark.__doc__.split("\n\n    Args:")[0],
            exit_on_error=False,
            allow_abbrev=False,
        )
        options.add_function_arguments(benchmark)
        options.add_argument("--json", type=str | None, default=None, help="file for the numbers of the tables.")
        parsers[name] = options
    return parsers


def _overview(parsers: dict[str, ArgumentParser]) -> ArgumentParser:
    """What lists the benchmarks, and refuses a name that is none."""
    parser = ArgumentParser(prog="lit-specrl bench", description="Measure this library on this machine.")
    subcommands = parser.add_subcommands(required=True)
    for name, options in {**parsers, "rollout": ArgumentParser()}.items():
        benchmark = BENCHMARKS.get(name, bench_rollout)
        assert benchmark.__doc__ is not None
        subcommands.add_subcommand(name, options, help=benchmark.__doc__.split("\n")[0])
    return parser


def _check_writable(file: Path) -> None:
    """Before minutes are spent on numbers that cannot be kept."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file} is not a file in an existing folder")
