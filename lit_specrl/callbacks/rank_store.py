"""What a callback keeps of each rank beside the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.checkpoints.rank_files import RankFiles
from lit_specrl.distributed.fsdp2 import FSDP2Strategy


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
    return isinstance(writer.checkpoint_io if isinstance(writer, AsyncCheckpointIO) else writer, AtomicCheckpointIO)


def sweep_rank_files(files: RankFiles, trainer: L.Trainer) -> None:
    """Delete what killed processes have left beside the checkpoints of the run and beside the one that it goes on from."""
    folders = {checkpoint_folder(trainer)}
    if trainer.ckpt_path:
        folders.add(Path(str(trainer.ckpt_path)).parent.absolute())
    for folder in folders:
        files.sweep(folder, trainer.global_rank)
