"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name when the block ends without an error.

    An older folder of the name is replaced. A process that is killed leaves `<name>.partial-...` behind, and between the two renames, for an instant, the older folder as
    `<name>.old-...`.

    Args:
        folder: the name; what it lies in is made.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o755)
        old = partial.with_name(partial.name.replace(".partial-", ".old-"))
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
