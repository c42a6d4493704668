"""A progress bar that moves while the engine generates."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.types import RolloutProgress

_REFRESH_S = 0.5


class RolloutProgressBar(TQDMProgressBar, RolloutCallback):
    """Lightning's progress bar with the reward of the latest step, and finished rows and tokens per second inside a
    rollout. On a terminal it also tells the stage that a step is in, and how many micro-batches of an update are done.
    Steps that take longer than a second are told in seconds a step.

    Args:
        refresh_rate: steps between updates of the bar; inside a step it moves twice a second.
    """

    BAR_FORMAT = TQDMProgressBar.BAR_FORMAT.replace("{rate_noinv_fmt}", "{rate_fmt}")

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._moved_at = 0.0

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_stage_start(self, trainer: L.Trainer, pl_module: RLVRModule, stage: str) -> None:
        self._tell_stage(trainer, pl_module, stage)

    def on_stage_progress(
        self, trainer: L.Trainer, pl_module: RLVRModule, stage: str, num_done: int, num_parts: int
    ) -> None:
        if time.monotonic() >= self._moved_at + _REFRESH_S:
            self._tell_stage(trainer, pl_module, f"{stage} {num_done}/{num_parts}")

    def _tell_stage(self, trainer: L.Trainer, pl_module: RLVRModule, stage: str) -> None:
        bar = self._bar(trainer) if self.is_enabled else None
        if bar is not None and bar.fp.isatty():
            bar.set_postfix(self.get_metrics(trainer, pl_module) | {"stage": stage}, refresh=True)
            self._moved_at = time.monotonic()

    def on_rollout_progress(self, trainer: L.Trainer, pl_module: RLVRModule, progress: RolloutProgress) -> None:
        bar = self._bar(trainer)
        if self.is_enabled and bar is not None:
            metrics = self.get_metrics(trainer, pl_module)
            metrics["rollout"] = f"{progress.rows_done}/{progress.num_rows}"
            metrics["tokens/s"] = f"{progress.num_tokens / max(progress.elapsed_s, 1e-9):.0f}"
            bar.set_postfix(metrics, refresh=True)

    def _bar(self, trainer: L.Trainer) -> Any:
        if trainer.sanity_checking or trainer.validating:
            return self._val_progress_bar
        if trainer.testing:
            return self._test_progress_bar
        return self._predict_progress_bar if trainer.predicting else self._train_progress_bar
