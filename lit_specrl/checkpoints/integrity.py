"""Whether a checkpoint is what was written, found out before it is loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_specrl.checkpoints.checksums import changed_files

OF_ALL_RANKS = "meta.pt"
"""What a sharded checkpoint holds beside its tensors."""


def check_checkpoint(path: Path, part: int = 0, num_parts: int = 1) -> None:
    """Refuse a checkpoint with a byte that is not the one that was written.

    torch writes a checksum of each tensor into its files and ignores it when it loads; this reads a file once, about 1
    GiB/s. A sharded checkpoint has checksums in files of its own; one of an earlier version has none, and only its
    files are looked for.

    Args:
        path: a file, or the folder of a sharded one.
        part: which files of a folder to look at, where several processes share the work, from 0.
        num_parts: number of those processes.

    Raises:
        ValueError: it is damaged, or no checkpoint; the message says which others there are.
    """
    with naming(path):
        if path.is_dir():
            _check_folder(path, part, num_parts)
        else:
            _check_file(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the checkpoint, and the others of its folder, in whatever goes wrong while it is read.

    Raises:
        ValueError: for any error.
    """
    try:
        yield
    except Exception as error:  # torch, zipfile and pickle raise all kinds where bytes are wrong
        found = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"the checkpoint {path} cannot be used: {found}. {_others(path)}") from error


def check_content(content: Any) -> None:
    """Refuse what was read from a sound file of something else.

    Raises:
        ValueError: it is not the state of a run of this library.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, a checkpoint of Lightning holds a dict")
    if "pytorch-lightning_version" not in content:
        names = ", ".join(sorted(map(str, content))[:5])
        raise ValueError(f"it is not a checkpoint of Lightning; it holds {names or 'nothing'}")
    if "rlvr" not in content:
        raise ValueError("it is a checkpoint of Lightning, but not of a module of lit_specrl (it has no entry 'rlvr')")


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ValueError("there is no such file")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    if not zipfile.is_zipfile(path):
        raise ValueError("the file is cut off or damaged, or is not a checkpoint")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the file is damaged: {damaged} does not match its checksum")


def _check_folder(path: Path, part: int, num_parts: int) -> None:
    missing = [name for name in (".metadata", OF_ALL_RANKS) if not (path / name).is_file()]
    if missing:
        raise ValueError(f"the folder lacks {' and '.join(missing)}, so it is not a sharded checkpoint")
    changed = changed_files(path, part, num_parts)
    if changed:
        raise ValueError(f"the folder is damaged: {', '.join(changed)} missing or not as written")
    _check_file(path / OF_ALL_RANKS)


def _others(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent}"
    others = [other for other in path.parent.glob("*.ckpt") if other.name != path.name and other.exists()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    if not others:
        return "It was left as it is; there is no other checkpoint in its folder"
    return f"It was left as it is; other checkpoints in its folder, the newest first: {', '.join(other.name for other in others)}"
