"""What a callback keeps of each rank beside the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.checkpoints.rank_files import RankFiles, Store, load_ranks
from lit_specrl.distributed.fsdp2 import FSDP2Strategy

S = TypeVar("S")


class RankStore:
    """Writes a store of each rank beside the checkpoints, and finds it again on resume.

    Lightning keeps the callback state of rank 0 alone.

    Args:
        name: of the folder of the files, beside the checkpoints.
    """

    def __init__(self, name: str) -> None:
        self._files = RankFiles(name)

    def save(self, trainer: L.Trainer, store: Store, identity: dict[str, str], step: int) -> dict[str, Any]:
        """Write this rank's file, just before its checkpoint.

        Args:
            trainer: of the run.
            store: what is written.
            identity: what its token ids and log-probs belong to.
            step: training step.

        Returns:
            What the checkpoint must hold, so that `load` finds the file.
        """
        folder = checkpoint_folder(trainer)
        self._files.save(
            folder,
            store,
            identity,
            step=step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            is_recorded=checkpoints_are_recorded(trainer),
        )
        return {"folder": str(folder), "step": step, "world_size": trainer.world_size}

    def load(
        self,
        trainer: L.Trainer,
        state: dict[str, Any],
        read: Callable[[Path], S],
        complaint: str,
        ranks: Sequence[int] | None = None,
    ) -> list[S]:
        """Read files of the checkpoint resumed from; a missing or damaged one is warned about and left out.

        Args:
            trainer: of the run.
            state: from `save`.
            read: reads one of them.
            complaint: the warning, with places for `{rank}` and `{error}`.
            ranks: of the run that wrote the checkpoint, whose files are read; `None` for this rank's alone.
        """
        return load_ranks(
            [
                Path(str(trainer.ckpt_path)).parent.absolute() / self._files.name,
                Path(state["folder"]) / self._files.name,
            ],
            [trainer.global_rank] if ranks is None else ranks,
            read,
            complaint,
            step=state["step"],
            world_size=state["world_size"],
        )

    def sweep(self, trainer: L.Trainer) -> None:
        """Delete the remains of killed processes beside the checkpoints of the run, and beside the one resumed from."""
        folders = {checkpoint_folder(trainer)}
        if trainer.ckpt_path:
            folders.add(Path(str(trainer.ckpt_path)).parent.absolute())
        for folder in folders:
            self._files.sweep(folder, trainer.global_rank)

    def close(self, trainer: L.Trainer) -> None:
        """Delete the files that no checkpoint needs, when the run has ended."""
        self._files.close(checkpoint_folder(trainer), trainer.global_rank)


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Where the run writes its checkpoints."""
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir).absolute()


def checkpoints_are_recorded(trainer: L.Trainer) -> bool:
    """Whether the writer of the checkpoints notes where they lie (`record`); a foreign `CheckpointIO` does not."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        return True
    if isinstance(strategy, ModelParallelStrategy):
        return False
    writer = strategy.checkpoint_io
    return isinstance(writer.checkpoint_io if isinstance(writer, AsyncCheckpointIO) else writer, AtomicCheckpointIO)
