"""Lightning's Callback with hooks around rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.checkpoints.checkpoint_io import WholeCheckpointIO
from lit_specrl.checkpoints.rank_files import RankFiles
from lit_specrl.distributed.fsdp2 import FSDP2Strategy
from lit_specrl.types import Experience, RolloutProgress, RolloutRequest, Rollouts

if TYPE_CHECKING:
    from lit_specrl.module import RLVRModule


class RolloutCallback(L.Callback):
    """A callback that proposes to, or observes, the rollouts of a step.

    The hooks come in the order in which they stand here. Rollouts of training and of evaluation both pass through them;
    `trainer.training` tells which.
    """

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        """Called before the engine sees the request; may change it."""

    def on_rollout_progress(self, trainer: L.Trainer, pl_module: RLVRModule, progress: RolloutProgress) -> None:
        """Called about twice a second while the engine generates."""

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        """Called when all rows are generated and decoded."""

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        """Called in training when rewards, advantages and the log-probs of the step are known, before the update."""


def require_rlvr_module(callback: L.Callback, pl_module: L.LightningModule) -> RLVRModule:
    """The module, if it is one that this library's callbacks work with.

    Raises:
        MisconfigurationException: it is another LightningModule.
    """
    from lit_specrl.module import RLVRModule

    if not isinstance(pl_module, RLVRModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} works with an RLVRModule such as GRPO, got {type(pl_module).__name__}"
        )
    return pl_module


def require_only_one(callback: L.Callback, trainer: L.Trainer) -> None:
    """Refuse a second callback of this class.

    Raises:
        MisconfigurationException: there are several.
    """
    same = [other for other in trainer.callbacks if isinstance(other, type(callback))]  # type: ignore[attr-defined]
    if len(same) > 1:
        raise MisconfigurationException(f"the trainer has {len(same)} callbacks {type(callback).__name__}; leave one")


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Where the run writes its checkpoints."""
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir).absolute()


def checkpoints_are_recorded(trainer: L.Trainer) -> bool:
    """Whether what writes the checkpoints tells the files beside them where they lie; a `CheckpointIO` of somebody else does not."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        return True
    if isinstance(strategy, ModelParallelStrategy):
        return False
    writer = strategy.checkpoint_io
    return isinstance(writer.checkpoint_io if isinstance(writer, AsyncCheckpointIO) else writer, WholeCheckpointIO)


def sweep_rank_files(files: RankFiles, trainer: L.Trainer) -> None:
    """Delete what killed processes have left beside the checkpoints of the run and beside the one that it goes on from."""
    folders = {checkpoint_folder(trainer)}
    if trainer.ckpt_path:
        folders.add(Path(str(trainer.ckpt_path)).parent.absolute())
    for folder in folders:
        files.sweep(folder, trainer.global_rank)
