"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name when the block ends without an error.

    An older folder of the name is replaced. A process that is killed leaves `<name>.partial-...` behind.

    Args:
        folder: the name; what it lies in is made.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o755)
        put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Where to write what shall be called `path`: in the same folder."""
    return path.with_name(f"{path.name}.partial")


def clear_partials(path: Path) -> None:
    """Make the folder of `path`, and delete what killed processes have left in it under partial names of the same suffix.

    Args:
        path: one process at a time writes into its folder names with its suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f"*{path.suffix}.partial"):
        delete(left_behind)


def put_in_place(written: Path, path: Path) -> None:
    """Give a file or folder that was written under another name beside it its own; what had that name is deleted. The bytes are on the disk before.

    At any moment there is one of the two under the name, where the file system can exchange names (local ones of Linux); elsewhere there is no folder for
    an instant, and a process that is killed then leaves the older one as `<name>.old`.
    """
    for file in [written] if written.is_file() else written.rglob("*"):
        if file.is_file():
            _flush(file)
    has_folder = written.is_dir() or path.is_dir()
    if not (has_folder and path.exists()):
        os.replace(written, path)
    elif _exchange(written, path):
        delete(written)
    else:
        old = path.with_name(f"{path.name}.old")
        os.rename(path, old)
        os.rename(written, path)
        delete(old)
    _flush(path.parent)


def delete(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths exchange their names in one step; False where that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
