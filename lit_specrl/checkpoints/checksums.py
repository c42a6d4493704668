"""Checksums of the files of a folder, in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import xxhash


def write_checksums(folder: Path, files: Iterable[Path], name: str = "checksums.json") -> None:
    """Write the checksums of files that are directly in the folder.

    Args:
        folder: of the files.
        files: whose content shall not change.
        name: of the file with the checksums; `checksums*.json`.
    """
    content = {file.name: _checksum(file) for file in sorted(files)}
    (folder / name).write_text(json.dumps(content, indent=1))


def changed_files(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Names of files that are missing or differ from their checksums; none where there are no checksums.

    Args:
        folder: of the files.
        part: which of them to look at, where several processes share the work, from 0.
        num_parts: number of those processes.
    """
    expected: dict[str, str] = {}
    changed = []
    for file in sorted(folder.glob("checksums*.json")):
        try:
            expected |= {str(name): str(checksum) for name, checksum in json.loads(file.read_bytes()).items()}
        except (ValueError, AttributeError):
            changed.append(file.name)
    for name, checksum in sorted(expected.items())[part::num_parts]:
        file = folder / Path(name).name
        if not file.is_file() or _checksum(file) != checksum:
            changed.append(name)
    return changed


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
