"""A run in one table."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.log_sinks import sink_of
from lit_specrl.callbacks.rollout_callback import require_rlvr_module


class RunSummary(L.Callback):
    """Prints, at the end of training, what was learned and where the time went; also at an end before its time.

    Held-out accuracy before training needs a validation before training (`num_sanity_val_steps=-1`). Each validation
    is told when it is done.

    Attributes:
        seconds: wall time of all training steps by stage, in seconds; "other" is what no stage accounts for, callbacks
            included.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rewards: dict[int, list[float]] = defaultdict(list)
        self.accuracies: list[float] = []
        self.num_steps = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        if "val_accuracy" in pl_module.evaluation:
            self.accuracies.append(pl_module.evaluation["val_accuracy"])
            when = f"after {pl_module.step} steps" if pl_module.step else "before training"
            bar, told = trainer.progress_bar_callback, f"held-out accuracy {when}: {self.accuracies[-1]:.3f}"
            if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
                rank_zero_only(tqdm.write)(told, file=sys.stderr)  # on a line of its own, above the bar
            else:
                rank_zero_info(told)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_rlvr_module(self, pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()  # of an earlier fit there was a table

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started_at = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: RLVRModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = pl_module.step_metrics
        stages = {
            name.removeprefix("timing_s/"): value
            for name, value in metrics.items()
            if name.startswith("timing_s/") and name not in ("timing_s/step", "timing_s/other")
        }
        elapsed_s = time.perf_counter() - self._started_at
        for stage, value in {**stages, "other": elapsed_s - sum(stages.values())}.items():
            self.seconds[stage] += value
        self.rewards[trainer.current_epoch].append(metrics["reward"])
        self.num_steps += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            return  # the message about it is what the user needs
        for callback in trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint):  # Lightning calls it later; it saves once a step
                callback.on_exception(trainer, pl_module, exception)
        self._tell_how_to_go_on(trainer)

    @rank_zero_only
    def _tell_how_to_go_on(self, trainer: L.Trainer) -> None:
        self._print(trainer)
        found = [path for callback in trainer.checkpoint_callbacks if (path := _last_checkpoint(callback))]  # type: ignore[attr-defined]
        checkpoints = sorted(found, key=lambda path: path.stat().st_mtime)
        print(
            f"Stopped. Go on with --ckpt_path {checkpoints[-1]}"
            if checkpoints
            else "Stopped. No checkpoint was saved; configs/trainer/resumable.yaml saves some"
        )

    @rank_zero_only
    def _print(self, trainer: L.Trainer) -> None:
        if self.num_steps:
            Console().print(self._table())
        for logger in trainer.loggers:
            if place := sink_of(logger).place():
                print(place)

    def _table(self) -> Table:
        table = Table("", "", title=f"{self.num_steps} steps", show_header=False)
        if len(self.accuracies) > 1:
            first, last = self.accuracies[0], self.accuracies[-1]
            table.add_row("held-out accuracy", f"{first:.3f} -> {last:.3f} ({last - first:+.3f})")
        means = [sum(rewards) / len(rewards) for rewards in self.rewards.values()]
        table.add_row("reward, first / last epoch", f"{means[0]:.3f} / {means[-1]:.3f}")
        total_s = sum(self.seconds.values())
        table.add_row("training, seconds", f"{total_s:.1f} ({total_s / self.num_steps:.2f} a step)")
        for stage, value in sorted(self.seconds.items(), key=lambda item: -item[1]):
            table.add_row(f"  {stage}", f"{value:.1f} ({value / total_s:.1%})")
        return table


def _last_checkpoint(callback: Any) -> Path | None:
    """What a run would go on from: the newest in the callback's folder, whichever of its rules has saved it."""
    saved = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    folder = Path(getattr(callback, "dirpath", None) or Path(saved or "nowhere").parent)
    newest = max(
        folder.glob("*.ckpt"), key=lambda path: (path.stat().st_mtime, path.name == Path(saved).name), default=None
    )
    return newest
