"""A progress bar that moves while the engine generates."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.types import RolloutProgress


class RolloutProgressBar(TQDMProgressBar, RolloutCallback):
    """Lightning's progress bar with the reward of the latest step, and finished rows and tokens per second inside a
    rollout. On a terminal it also tells the stage that a step is in.

    Args:
        refresh_rate: steps between updates of the bar; inside a rollout it moves twice a second.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_stage_start(self, trainer: L.Trainer, pl_module: RLVRModule, stage: str) -> None:
        bar = self._bar(trainer) if self.is_enabled else None
        if bar is not None and bar.fp.isatty():
            bar.set_postfix(self.get_metrics(trainer, pl_module) | {"stage": stage}, refresh=True)

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
