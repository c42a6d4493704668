"""Checkpoints that a killed process leaves whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_specrl.whole_files import clear_partials, partial_name, put_in_place


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

    Lightning 2.6 writes it into memory, then into the folder for temporary files, and moves it; where that is another file system the move is a copy, of which a killed
    process leaves the beginning under the checkpoint's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        clear_partials(path)
        torch.save(checkpoint, partial_name(path))
        put_in_place(partial_name(path), path)
