"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from lit_specrl.checkpoints.locks import delete, held_folder, sweep


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name when the block ends without an error.

    An older folder of the name is replaced. The remains of a killed process are deleted by the next one that writes
    there.

    Args:
        folder: the name; what it lies in is made.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name
    with partial_folder(folder) as partial:
        written = partial / folder.name
        with telling_of_a_full_disk(folder, written):
            written.mkdir()
            yield written
            replace_atomically(written, folder)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A new file to write, which takes the name `path` when the block ends without an error.

    Args:
        path: the name; what it lies in is made.
    """
    path = Path(path)
    with partial_folder(path) as partial, telling_of_a_full_disk(path, partial / path.name):
        yield partial / path.name
        replace_atomically(partial / path.name, path)


@contextmanager
def telling_of_a_full_disk(path: Path, written: Path) -> Iterator[None]:
    """Name the file and the free space when the disk is full; torch and safetensors say it in words of their own.

    Args:
        path: the final name.
        written: what is being written.

    Raises:
        OSError: with the number of the system's error.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error, written)
        if number not in _NO_ROOM:
            raise
        free = shutil.disk_usage(path.parent).free / 2**30
        raise OSError(
            number,
            f"{path} could not be written: {os.strerror(number)} ({free:.1f} GiB are free). What was saved before is "
            "untouched; make room, then resume from the latest checkpoint",
        ) from error


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _system_error(error: Exception, written: Path) -> int:
    """Its number, or 0: of the error, in its text, or of another attempt to write a little more."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    in_text = re.search(r"os error (\d+)", str(error))
    if in_text:
        return int(in_text[1])
    files = [written] if written.is_file() else [file for file in written.rglob("*") if file.is_file()]
    try:
        for largest in sorted(files, key=lambda file: file.stat().st_size)[-1:]:
            with largest.open("ab") as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
    except OSError as probe:
        return probe.errno or 0
    return 0


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, held by this process and deleted when the block ends.

    Folders that killed processes have left there for files of the same suffix are deleted first; without a suffix,
    those for the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = f"*{escape(path.suffix)}.partial" if path.suffix else f"{escape(path.name)}.partial"
    sweep([*path.parent.glob(names), *path.parent.glob(f"{names}-*")])
    with held_folder(path.parent, f"{path.name}.partial-") as partial:
        yield partial


def replace_atomically(written: Path, path: Path) -> None:
    """Rename `written`, which lies beside `path`, to `path`, and delete what had that name.

    The bytes are flushed to the disk before. Where the file system can exchange names (local ones of Linux), one of the
    two has the name at any moment. Elsewhere there is no folder for an instant, and a process that is killed then
    leaves the older one as `<name>.old`.
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
        delete(old)  # of a killed process; `path` is whole
        os.rename(path, old)
        os.rename(written, path)
        delete(old)
    _flush(path.parent)


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
