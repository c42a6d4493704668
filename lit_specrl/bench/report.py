"""What a benchmark found, as tables on the screen, or as plain data with the same names and numbers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lit_specrl import types


class Ratio(float):
    """How many times as much, printed as `1.70x`."""


@dataclass(frozen=True)
class Report:
    """Results of one benchmark.

    Example: two ways of doing something, measured and compared::

        Report(
            hardware="AMD EPYC, 2 cores, 2 threads",
            torch_version="2.13.0",
            settings={"benchmark": "adding", "repeats": 5},
            tables={
                "measured": [{"way": "fast", "seconds_median": 1.0}, {"way": "slow", "seconds_median": 3.0}],
                "compared": [{"time_slow_over_fast": Ratio(3.0)}],
            },
        )
    """

    hardware: str
    torch_version: str
    settings: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]
    """Rows by title; the keys of a row are the names of its columns, unit included. `None` is what could not be
    measured."""
    notes: list[str] = field(default_factory=list)
    """What the reader must know about the numbers."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What makes the numbers of a table weak, by its title: printed above it."""
    failures: list[str] = field(default_factory=list)
    """Checks that did not hold; the command then ends with an error."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def print(self) -> None:
        """Hardware, versions and settings in the first line, then the tables."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        console = Console(highlight=False, markup=False)
        console.print(f"{self.hardware}, torch {self.torch_version}, {settings}", soft_wrap=True)
        for title, rows in self.tables.items():
            table = Table(*(name.replace("_", " ") for name in rows[0]), title=title, title_justify="left")
            for name, column in zip(rows[0], table.columns, strict=True):
                column.min_width = max(len(word) for word in name.split("_"))  # narrow screens cut words otherwise
                column.justify = "left" if isinstance(rows[0][name], str) else "right"
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            for warning in self.warnings.get(title, []):
                console.print(f"! {warning}", soft_wrap=True)
            console.print(table)
        for note in self.notes:
            console.print(note, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Ratio):
        return f"{value:.2f}x"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Columns that tell how repeats of one measurement are spread.

    Example:
        >>> spread([3.0, 1.0, 1.5])
        {'seconds_min': 1.0, 'seconds_median': 1.5, 'seconds_max': 3.0}
    """
    return {
        "seconds_min": min(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
    }


def resolve_device(device: str) -> str:
    """`cpu` or `cuda` for `auto`.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use cpu")
    return device


def describe_hardware(device: str) -> str:
    """Name of the GPU, or of the CPU with its cores and the threads that torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def check_at_least_one(**counts: int) -> None:
    """Refuse settings that leave nothing to measure, by the options that the user typed."""
    types.check_at_least_one(**{f"--{name}": count for name, count in counts.items()})
