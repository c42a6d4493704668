"""Completions of `predict` as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_specrl.checkpoints.atomic_files import replace_atomically


class CompletionWriter(BasePredictionWriter):
    """Writes what `predict` generates as JSONL, one record per completion.

    Records appear batch by batch under a temporary name; the file itself appears when it is complete.

    Args:
        path: the file. With several ranks each writes its own, with ".rank1" and so on before the suffix.
    """

    def __init__(self, path: str = "completions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._target = self.path
        if trainer.world_size > 1:
            self._target = self.path.with_suffix(f".rank{trainer.global_rank}{self.path.suffix}")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._target.with_name(self._target.name + ".partial")
        self._partial.write_text("")
        self._num_written = 0

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: list[dict[str, Any]], *unused: Any
    ) -> None:
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in prediction)
        self._num_written += len(prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        replace_atomically(self._partial, self._target)
        rank_zero_info(f"{self._num_written} completions are in {self._target.absolute()}")
