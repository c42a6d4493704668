"""What a living process still needs, told by a lock that ends with it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir, mkdtemp

_OURS = "lit_specrl-"


def hold(path: Path) -> int | None:
    """Keep a file or folder from being swept until the descriptor is closed or the process ends, under any name.

    Returns:
        A descriptor to close, or `None` if another process is just deleting it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    is_lost = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        is_lost = os.fstat(descriptor).st_nlink == 0
    except BlockingIOError:
        is_lost = True
    except OSError:
        pass  # a file system without locks, on which nothing is swept either
    if is_lost:
        os.close(descriptor)
        return None
    return descriptor


def let_go(descriptor: int) -> None:
    """End a hold, also for processes that were forked since."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds it; True, too, where that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def sweep(paths: Iterable[Path]) -> None:
    """Delete files and folders of this user that no living process holds."""
    for path in paths:
        with suppress(OSError):  # gone already, or of a folder that is read-only
            if path.lstat().st_uid == os.getuid() and not path.is_symlink() and not is_held(path):
                delete(path)


@contextmanager
def held_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is held, and deleted when the block ends."""
    path, descriptor = _make(parent, prefix)
    try:
        yield path
    finally:
        delete(path)
        let_go(descriptor)


class ProcessFolder(TemporaryDirectory[str]):
    """A temporary folder that is deleted with its object, or, after a kill, when the next process makes one.

    Args:
        purpose: a part of its name.
    """

    def __init__(self, purpose: str) -> None:
        sweep(Path(gettempdir()).glob(f"{_OURS}*"))
        descriptor = None
        while descriptor is None:
            super().__init__(prefix=f"{_OURS}{purpose}-", ignore_cleanup_errors=True)
            descriptor = hold(Path(self.name))
        self._descriptor: int | None = descriptor

    def cleanup(self) -> None:
        super().cleanup()
        if self._descriptor is not None:
            let_go(self._descriptor)
        self._descriptor = None


def delete(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        path = Path(mkdtemp(dir=parent, prefix=prefix))
        descriptor = hold(path)
        if descriptor is not None:
            return path, descriptor
