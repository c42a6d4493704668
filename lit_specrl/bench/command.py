"""`lit-specrl bench NAME`: one subcommand per benchmark, whose options are the arguments of its function."""

from __future__ import annotations

import json
from pathlib import Path

from lit_specrl.cli.commands import Command, overview, unknown
from lit_specrl.cli.messages import ConfigurationError

_SUMMARIES = {
    "rollout": "Train with and without callbacks, and compare time, tokens and what was learned.",
    "engine": "Compare rollouts of the engine with vLLM's own `LLM.generate`, and time verification and hand-over of weights.",
    "logprobs": "Compare the log-probs of the library, computed in chunks, with logits in full.",
    "math-reward": "Answers that `MathReward` decides in a second, on the references of your own data.",
    "prefix-cache": "Time and memory of the cache of a step's responses.",
    "shared-prompts": "Time forward and backward of one training step, with and without shared prompts.",
    "speculation": "Time vLLM without speculation, with each number of drafted tokens, and with the scheduler.",
    "toy-policy": "Make the tiny policy of recipes/toy_sums.yaml, and measure how often it is right.",
    "weight-sync": "Time the hand-over of weights to the engine, and measure the memory that it takes.",
}


def _benchmark(name: str) -> Command:
    module = name.replace("-", "_")
    is_rollout = name == "rollout"
    path = "rollout.command.rollout" if is_rollout else f"{module}.bench_{module}"
    return Command(
        f"lit-specrl bench {name}", _SUMMARIES[name], f"lit_specrl.bench.{path}", takes_fit_options=is_rollout
    )


BENCHMARKS = {name: _benchmark(name) for name in _SUMMARIES}
"""Every one returns a `Report`."""


def bench_command(arguments: list[str]) -> None:
    """`lit-specrl bench NAME [options] [--json FILE]`; without a name, `rollout`."""
    if arguments[:1] in (["-h"], ["--help"]):
        usage = "lit-specrl bench NAME [options] [--json FILE]"
        summaries = {name: benchmark.summary for name, benchmark in BENCHMARKS.items()}
        print(overview(usage, "Measure this library on this machine; without a name, `rollout`.", summaries))
        print(
            "\n`lit-specrl bench NAME --help` lists the options. --json writes the numbers of the tables into a file."
        )
        return
    name, *options = ["rollout", *arguments] if arguments[:1] and arguments[0].startswith("--") else arguments or [""]
    if name not in BENCHMARKS:
        raise ConfigurationError(unknown(name, "benchmark", list(BENCHMARKS)))
    options, json_file = _without_json(options)
    if json_file is not None:
        _check_writable(json_file)
    report = BENCHMARKS[name].call(options)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    report.print()
    if report.failures:
        raise SystemExit(f"lit-specrl bench {name}: " + "; ".join(report.failures))


def _without_json(options: list[str]) -> tuple[list[str], Path | None]:
    """The options of the benchmark, and the file that `--json` names."""
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == "--json":
            value = value if equals else "".join(options[index + 1 : index + 2])
            if not value or value.startswith("--"):
                raise ConfigurationError("--json needs a file, as in --json numbers.json")
            return options[:index] + options[index + (1 if equals else 2) :], Path(value)
    return options, None


def _check_writable(file: Path) -> None:
    """Before minutes are spent on numbers that cannot be kept."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file} is not a file in an existing folder")
