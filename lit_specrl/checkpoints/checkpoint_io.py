"""Checkpoints that are written and read completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_specrl.checkpoints.atomic_files import atomic_file
from lit_specrl.checkpoints.content import loadable
from lit_specrl.checkpoints.integrity import check_checkpoint, check_content, naming
from lit_specrl.checkpoints.rank_files import record


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; checks content before writing, and files before reading.

    Lightning 2.6 writes it into memory, then into the folder for temporary files, and moves it. Where that is another
    file system the move is a copy, and a killed process leaves a truncated file under the checkpoint's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = loadable(checkpoint)
        with atomic_file(path) as partial:
            torch.save(content, partial)
            record(content, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        check_checkpoint(Path(path))
        with naming(Path(path)):
            content = super().load_checkpoint(path, map_location, weights_only)
            check_content(content)
        return content
