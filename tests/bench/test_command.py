import json
import pkgutil
import sys

import pytest

from lit_specrl.bench import command
from lit_specrl.bench.report import Ratio, Report
from lit_specrl.cli import main as cli
from lit_specrl.cli.commands import Command
from lit_specrl.cli.messages import ConfigurationError, exit_code

REPORT = {
    "hardware": "a CPU, 2 cores, 1 threads",
    "torch_version": "2.13.0",
    "settings": {"benchmark": "adding", "repeats": 5},
    "tables": {
        "measured": [
            {"way": "fast", "tokens": 12345, "seconds": 0.123456},
            {"way": "slow", "tokens": 7, "seconds": None},
        ],
        "compared": [{"time_slow_over_fast": Ratio(3.0)}],
    },
    "warnings": {"compared": ["The slow way was guessed."]},
    "notes": ["The slow way was not run."],
    "failures": [],
}


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark whose report is known; returns what it was called with."""
    calls = []

    def adding(repeats: int = 5, device: str = "cpu") -> Report:
        """Add numbers.

        Args:
            repeats: how often.
            device: where.
        """
        if repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {repeats}")
        calls.append((repeats, device))
        return Report(**{**REPORT, "failures": ["the sums differ"] if repeats == 13 else []})

    monkeypatch.setitem(command.BENCHMARKS, "adding", Command("lit-specrl bench adding", "Add numbers.", adding))
    return calls


def test_the_first_line_tells_hardware_version_and_settings(benchmark, capsys):
    command.bench_command(["adding", "--repeats", "2", "--device=gpu"])
    first_line, *lines = capsys.readouterr().out.splitlines()
    assert first_line == "a CPU, 2 cores, 1 threads, torch 2.13.0, benchmark=adding repeats=5"
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [["fast", "12,345", "0.1235"], ["slow", "7", "-"], ["3.00x"]]
    assert lines[-1] == "The slow way was not run."
    stripped = [line.strip() for line in lines]
    assert stripped.index("! The slow way was guessed.") + 1 == stripped.index("compared")
    assert benchmark == [(2, "gpu")]


def test_the_json_file_holds_the_report_that_is_printed(benchmark, tmp_path, capsys):
    command.bench_command(["adding", "--json", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == REPORT
    Report(**numbers).print()
    assert capsys.readouterr().out == printed.replace(" 3.00x ", "     3 ")  # JSON knows numbers alone


def test_a_failed_check_ends_the_command_with_an_error_after_the_tables(benchmark, capsys):
    with pytest.raises(SystemExit, match=r"^lit-specrl bench adding: the sums differ$"):
        command.bench_command(["adding", "--repeats", "13"])
    assert "time slow over fast" in capsys.readouterr().out


def test_a_wrong_value_ends_the_command_with_the_message(benchmark):
    with pytest.raises(ValueError, match=r"^--repeats must be at least 1, got 0$"):
        command.bench_command(["adding", "--repeats", "0"])


def test_a_json_file_that_cannot_be_written_is_refused_before_anything_runs(benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"--json .*nowhere.*numbers.json is not a file in an existing folder"):
        command.bench_command(["adding", "--json", str(tmp_path / "nowhere" / "numbers.json")])
    assert benchmark == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["logprobs", "--dtype", "int8"], ["dtype", "bfloat16", "int8"]),
        (["logprobs", "--repeats", "many"], ["repeats", "many"]),
        (["logprobs", "--vocabulary", "5"], ["vocabulary"]),
        (["shared-prompts"], ["model"]),
        (["sharing"], ["sharing", "logprobs", "shared-prompts"]),
        ([], ["benchmark", "logprobs", "shared-prompts"]),
        (["rollout", "--config=run.yaml"], ["lit-specrl bench rollout needs --without"]),
        (["logprobs", "--json"], ["--json needs a file"]),
    ],
)
def test_wrong_arguments_are_named(arguments, named, capsys):
    with pytest.raises((SystemExit, ConfigurationError)) as end:
        command.bench_command(arguments)
    assert exit_code(end.value) == 2 or end.value.code == 2
    message = f"{end.value} {capsys.readouterr().err}"
    assert all(word in message for word in named)


def test_help_tells_what_each_benchmark_does(capsys):
    command.bench_command(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Compare the log-probs of the library" in text
    assert "Time forward and backward of one training step" in text


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_the_list_of_benchmarks_says_what_their_docstrings_say(name):
    benchmark = command.BENCHMARKS[name]
    first_line = pkgutil.resolve_name(benchmark.function).__doc__.splitlines()[0]
    assert first_line == benchmark.summary


def test_lit_specrl_hands_bench_its_arguments(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-specrl", "bench", "adding", "--repeats", "3"])
    cli.main()
    assert benchmark == [(3, "cpu")]
