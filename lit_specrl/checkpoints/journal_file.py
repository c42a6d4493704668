"""A file of records that grows, and of which every whole record can be read whenever the writer was killed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xxhash

from lit_specrl.checkpoints.locks import hold, let_go

_HEAD = struct.Struct("<I16s")  # bytes of the content, key
_CHECKSUM_BYTES = 8
_IDENTITY = bytes(16)  # key of the first record


class JournalFile:
    """Appends records to a file, held by the process until it is closed (see `locks`).

    A record is written in one piece as it comes, so that the end of the process loses none of them. `sync` is for the
    end of the machine. A record that was cut short is dropped with the next opening, and so is what follows one whose
    checksum is wrong.

    Args:
        path: the file; what it lies in is made. Content of another identity is replaced.
        identity: what the records belong to.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found_identity, self.found, length = read_journal(path)
        """The records of before, by key."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._hold = hold(path)
        self._thread = ThreadPoolExecutor(1, "journal")
        self._syncing: Future[None] | None = None
        self.num_bytes = length
        if found_identity != identity:
            self.found, self.num_bytes = {}, 0
        os.ftruncate(self._file, self.num_bytes)
        if not self.num_bytes:
            self.append({_IDENTITY: json.dumps(identity).encode()})

    def append(self, records: Mapping[bytes, bytes]) -> None:
        """Write records: key of 16 bytes -> content."""
        data = b"".join(_record(key, content) for key, content in records.items())
        self.num_bytes += len(data)
        while data:
            data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """Begin to bring what was written to the disk, without waiting for it."""
        if self._syncing is None or self._syncing.done():
            self._syncing = self._thread.submit(_sync, self._file)

    def close(self) -> None:
        """Begin to bring what was written to the disk, and let the file go behind it."""
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)

    def wait(self) -> None:
        """Until a closed file is on the disk."""
        self._thread.shutdown()

    def _end(self) -> None:
        _sync(self._file)
        os.close(self._file)
        if self._hold is not None:
            let_go(self._hold)


def read_journal(path: Path) -> tuple[dict[str, str] | None, dict[bytes, bytes], int]:
    """Identity, records by key, and the bytes that are whole; `None`, nothing and 0 for a file without a whole
    identity."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, {}, 0
    identity, records, length = None, dict[bytes, bytes](), 0
    for key, content, end in _records(data):
        if identity is None:
            if key != _IDENTITY:
                break
            identity = json.loads(content)
        else:
            records[key] = content
        length = end
    return identity, records, length


def _record(key: bytes, content: bytes) -> bytes:
    data = _HEAD.pack(len(content), key) + content
    return data + xxhash.xxh3_64_digest(data)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Key, content and end of each record up to the first that is not whole."""
    start = 0
    while start + _HEAD.size + _CHECKSUM_BYTES <= len(data):
        length, key = _HEAD.unpack_from(data, start)
        content_end = start + _HEAD.size + length
        end = content_end + _CHECKSUM_BYTES
        if data[content_end:end] != xxhash.xxh3_64_digest(data[start:content_end]):
            return
        yield key, data[start + _HEAD.size : content_end], end
        start = end


def _sync(file: int) -> None:
    with suppress(OSError):  # a file system that cannot
        os.fsync(file)
