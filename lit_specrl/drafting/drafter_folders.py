"""Folders that a drafter may be written to."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_output(folder: str | Path | None) -> None:
    """Refuse a folder that holds something else: a drafter takes the place of what had its name, with all in it.

    Args:
        folder: where a drafter shall go; `None` for nowhere.

    Raises:
        MisconfigurationException: it exists, and is neither empty nor a drafter that this library wrote, or it is the
            working folder.
    """
    if folder is None:
        return
    path = Path(os.path.abspath(folder))
    if Path.cwd().is_relative_to(path):
        raise MisconfigurationException(
            f"output must be a folder of the drafter's own, got {str(folder)!r}, which holds the working folder; name "
            "a new one, such as drafter"
        )
    if path.exists() and not _may_be_replaced(path):
        raise MisconfigurationException(
            f"output must be a new folder, an empty one or an older drafter, which is replaced; {path} holds something "
            "else. Name another folder, or delete this one if it is not needed"
        )


def _may_be_replaced(path: Path) -> bool:
    """Whether a folder is empty or as `save_head` and `CausalNetwork.save` write it: checkpoints have no config, and
    folders of several models have folders."""
    if not path.is_dir():
        return False
    files = {entry.name for entry in path.iterdir() if entry.is_file()}
    is_drafter = {"config.json", "checksums.json"} <= files and len(files) == len(list(path.iterdir()))
    return is_drafter or not any(path.iterdir())
