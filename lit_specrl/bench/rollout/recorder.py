"""The callback that keeps the numbers of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.bench.report import describe_hardware
from lit_specrl.bench.rollout.progress import STEPS_FILE
from lit_specrl.bench.rollout.records import EvaluationRecord, RunRecord, StepRecord
from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_rlvr_module
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.types import Rollouts


class RunRecorder(RolloutCallback):
    """Writes every step and every validation of a run into a file when training has come to its end.

    It should be the first callback, so that what the others do between steps counts as training.

    Args:
        file: the file, in an existing folder.
        settings_hash: what to remember of the settings.
    """

    def __init__(self, file: str, settings_hash: str) -> None:
        self.file = Path(file)
        self.settings_hash = settings_hash
        self.record: RunRecord | None = None
        self._tokens = (0, 0)  # generated, in all
        self._decode_steps = 0
        self._lap_started_at = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device.type
        require_rlvr_module(self, pl_module)
        self.record = RunRecord(self.settings_hash, describe_hardware(device), torch.__version__)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._end_of_lap()
        self._tokens, self._decode_steps = (0, 0), 0

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        generated, in_all = self._tokens
        self._tokens = generated + rollouts.num_generated_tokens, in_all + rollouts.num_tokens
        prefixes = map(rollouts.request.prefix, range(rollouts.num_rows))
        rests = (len(ids) - len(prefix) for ids, prefix in zip(rollouts.response_ids, prefixes, strict=True))
        self._decode_steps += max(rests, default=0)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: RLVRModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        generated, in_all = (sum(counts) for counts in zip(*gather_objects(self._tokens), strict=True))
        metrics = dict(pl_module.step_metrics)
        start_s = metrics.get("timing_s/start_engine", 0.0)
        decode_steps = max(gather_objects(self._decode_steps))
        step = StepRecord(trainer.current_epoch, -start_s, generated, in_all, metrics, decode_steps)
        self._record.steps.append(step)
        self._end_of_lap()
        if trainer.is_global_zero:
            self._tell(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_of_lap()

    def on_validation_end(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        self._lap_started_at = time.perf_counter()
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return  # a part of the validation data
        record = self._record
        metrics = {name: float(value) for name, value in pl_module.evaluation.items()}
        record.evaluations.append(EvaluationRecord(len(record.steps), record.training_s, metrics))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_of_lap()
        if trainer.is_global_zero:
            self._record.save(self.file)

    def _tell(self, trainer: L.Trainer) -> None:
        """A line for whoever waits for the run."""
        steps, epochs = self._record.steps, trainer.max_epochs or -1
        planned = f" of {epochs * trainer.num_training_batches:g}" if epochs > 0 else ""
        line = f"{len(steps)}{planned} steps, {self._record.training_s:.0f} s, reward {steps[-1].metrics['reward']:.3f}"
        with self.file.with_name(STEPS_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def _record(self) -> RunRecord:
        assert self.record is not None
        return self.record

    def _end_of_lap(self) -> None:
        """What has passed since the last lap belongs to the latest step; before the first one it belongs to nobody."""
        now = time.perf_counter()
        if self._record.steps:
            self._record.steps[-1].wall_s += now - self._lap_started_at
        self._lap_started_at = now
