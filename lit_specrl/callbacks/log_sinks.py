"""What each kind of logger can take beyond single curves, and where it puts what it was given."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard.summary import hparams

_RESULTS = ("reward", "val_accuracy", "completions/mean_length")
"""Curves whose latest values stand beside the settings in HParams."""
_NOTHING = "(none)"  # a prompt without reference answer, a reward that does not apply
_BINS = 20

Layout = dict[str, dict[str, list[Any]]]
"""Tab -> chart -> kind and names of its curves, as TensorBoard's custom scalars take it."""


class Table(NamedTuple):
    """Rows of texts and numbers, `None` where there is nothing."""

    columns: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """As text; what stands in a cell is shown as it is, a text as code, unless it is the last."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        for *cells, end in self.rows:
            lines.append("| " + " | ".join([*map(_cell, cells), end]) + " |")
        return "\n".join(lines)


class LogSink:
    """Any logger of Lightning: curves and settings; tables and histograms where it has `log_table(key, columns, data,
    step)` as `WandbLogger` has it, or `log_histogram(key, values, step)`.

    Args:
        logger: of the trainer.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def charts(self, layout: Layout) -> None:
        """Group the curves."""

    def settings(self, settings: dict[str, Any]) -> None:
        """Show the settings of the run."""
        self.logger.log_hyperparams(settings)

    def table(self, name: str, table: Table, step: int) -> None:
        """Show a table."""
        if callable(getattr(self.logger, "log_table", None)):
            self.logger.log_table(name, columns=table.columns, data=table.rows, step=step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Show how values are spread."""
        if callable(getattr(self.logger, "log_histogram", None)):
            self.logger.log_histogram(name, values, step=step)

    def place(self) -> str:
        """Where the curves are, as a line for the end of a run; empty where nobody knows."""
        return f"Curves: {self.logger.save_dir} ({type(self.logger).__name__})" if self.logger.save_dir else ""


class TensorBoardSink(LogSink):
    """Tabs of custom scalars, tables as text, histograms, HParams."""

    def charts(self, layout: Layout) -> None:
        self.logger.experiment.add_custom_scalars(layout)

    def settings(self, settings: dict[str, Any]) -> None:
        """The row of the run in HParams. Its results are the curves of these names; Lightning's own way would add a
        first point to them."""
        self.logger.hparams.update(settings)  # for `hparams.yaml`
        for summary in hparams(settings, dict.fromkeys(_RESULTS, 0.0)):
            self.logger.experiment.file_writer.add_summary(summary)

    def table(self, name: str, table: Table, step: int) -> None:
        self.logger.experiment.add_text(name, table.markdown(), step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self.logger.experiment.add_histogram(name, torch.tensor(values), step)

    def place(self) -> str:
        return f"Curves and completions: tensorboard --logdir {self.logger.save_dir}"


class WandbSink(LogSink):
    """Tables and histograms of Weights & Biases, which groups curves by what stands before the slash itself."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        import wandb

        self.logger.log_metrics({name: wandb.Histogram(list(values))}, step)

    def place(self) -> str:
        run = self.logger.experiment
        if run.offline:
            return f"Curves and completions: wandb sync {Path(run.dir).parent}"
        return f"Curves and completions: {run.url}"


class MLFlowSink(LogSink):
    """Tables and histograms as files of the run; MLflow has no others."""

    def table(self, name: str, table: Table, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, table.markdown(), f"{name}/{step:08d}.md")

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self.logger.experiment.log_dict(self.logger.run_id, _histogram(values), f"{name}/{step:08d}.json")

    def place(self) -> str:
        return f"Curves and completions: mlflow ui --backend-store-uri {self.logger._tracking_uri}"


class CSVSink(LogSink):
    """Tables and histograms as further files beside `metrics.csv`, with a column for the step."""

    def table(self, name: str, table: Table, step: int) -> None:
        self._append(name, ["step", *table.columns], [[step, *row] for row in table.rows])

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        found = _histogram(values)
        edges = zip(found["edges"], found["edges"][1:], found["counts"], strict=False)
        self._append(name, ["step", "from", "to", "count"], [[step, *edge] for edge in edges])

    def place(self) -> str:
        return f"Curves and completions: {Path(self.logger.log_dir) / 'metrics.csv'}, and the files beside it"

    def _append(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        path = Path(self.logger.log_dir) / f"{name.replace('/', '_')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _header(path) != columns:  # of a run with other rewards
            path.rename(_free_name(path))
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows] if is_new else rows)


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _free_name(path: Path) -> Path:
    """`completions.1.csv`, or with the next number that is free."""
    names = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


_SINKS: list[tuple[type[Logger], type[LogSink]]] = [
    (TensorBoardLogger, TensorBoardSink),
    (WandbLogger, WandbSink),
    (MLFlowLogger, MLFlowSink),
    (CSVLogger, CSVSink),
]


def sink_of(logger: Logger) -> LogSink:
    """What a logger can take."""
    return next((sink for kind, sink in _SINKS if isinstance(logger, kind)), LogSink)(logger)


def _histogram(values: Sequence[float]) -> dict[str, list[float]]:
    counts, edges = torch.histogram(torch.tensor(values, dtype=torch.float64), _BINS)
    return {"edges": edges.tolist(), "counts": [int(count) for count in counts.tolist()]}


def _cell(value: Any) -> str:
    """Text as it is, inside a Markdown table: special tokens and formulas must not turn into markup."""
    if not isinstance(value, str):
        return _NOTHING if value is None else f"{value:.3g}"
    escaped = (
        value.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "&#124;")
        .replace("`", "&#96;")
    )
    return f"<code>{escaped}</code>".replace("\n", "</code><br><code>")
