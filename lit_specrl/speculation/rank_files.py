"""What each rank keeps, as files beside the checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lit_specrl.speculation.store import RolloutStore
from lit_specrl.speculation.tensor_file import RejectedFileError


class Store(Protocol):
    """What can be written."""

    def save(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        """Write a file that is whole at any moment."""


class RankFiles:
    """Writes what a rank keeps beside checkpoints, and deletes it again when its checkpoints are gone.

    A file is written just before its checkpoint, whose name is not known by then. So the checkpoints that are new at the next write are
    those of the last one; a file that no checkpoint of the folder appeared for (it lies elsewhere) is never deleted.

    Args:
        name: of the folder of the files, beside the checkpoints.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._checkpoints: dict[Path, set[tuple[Path, int]]] = {}  # file -> (checkpoint, time of its last change)
        self._seen: set[tuple[Path, int]] = set()
        self._latest: Path | None = None

    def save(
        self, folder: Path, store: Store, identity: dict[str, str], *, step: int, rank: int, world_size: int
    ) -> None:
        """Delete the files whose checkpoints are gone, and write this one.

        Args:
            folder: where the checkpoints are; the files are in a folder of their own in it.
            store: what is written.
            identity: what its token ids and log-probs belong to.
            step: training step.
            rank: this rank.
            world_size: number of ranks.
        """
        self.prune(folder)
        path = rank_file(folder / self.name, step, rank, world_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.save(path, identity)
        self._latest = path
        self._checkpoints.setdefault(path, set())

    def prune(self, folder: Path) -> None:
        """Delete the files whose checkpoints were in the folder and are gone."""
        present = _present(folder)
        if self._latest is not None:
            self._checkpoints[self._latest] |= present - self._seen
        self._latest, self._seen = None, present
        for file in [file for file, own in self._checkpoints.items() if own and not any(map(_still_there, own))]:
            file.unlink(missing_ok=True)
            del self._checkpoints[file]

    def adopt(self, checkpoint: Path, *, step: int, rank: int, world_size: int) -> None:
        """Remember the file that a resumed run was saved with, so that it goes with its checkpoint.

        Args:
            checkpoint: that the run was resumed from.
            step: training step of the checkpoint.
            rank: this rank.
            world_size: number of ranks at that time.
        """
        own = {entry for entry in _present(checkpoint.parent) if entry[0].name == checkpoint.name}
        file = rank_file(checkpoint.parent.absolute() / self.name, step, rank, world_size)
        self._checkpoints[file] = own


PREFIX_CACHE = "prefix_cache"
"""Folder of the prefix cache's files."""


def load_ranks(
    folders: Sequence[Path],
    ranks: Sequence[int],
    identity: dict[str, str],
    *,
    step: int,
    world_size: int,
    max_bytes: int | None,
) -> RolloutStore:
    """Read the caches of several ranks into one; what is missing or damaged is warned about and left out.

    Args:
        folders: of checkpoints, where to look, in this order.
        ranks: whose caches.
        identity: what they must belong to.
        step: training step that they were written in.
        world_size: number of ranks at that time.
        max_bytes: of the new store.
    """
    stores = []
    for rank in ranks:
        paths = [rank_file(folder / PREFIX_CACHE, step, rank, world_size) for folder in folders]
        path = next((path for path in paths if path.exists()), paths[0])
        try:
            stores.append(RolloutStore.load(path, identity))
        except (FileNotFoundError, RejectedFileError) as error:
            warnings.warn(
                f"the prefix cache of rank {rank} cannot be used, its prompts are generated afresh once: {error}",
                stacklevel=2,
            )
    return RolloutStore.merge(stores, max_bytes)


def rank_file(folder: Path, step: int, rank: int, world_size: int) -> Path:
    """Of a rank, written at a step."""
    return folder / f"step-{step:08d}-rank{rank}-of-{world_size}.safetensors"


def _present(folder: Path) -> set[tuple[Path, int]]:
    """Checkpoints of a folder with the time of their last change; not links to nothing, nor what another rank deletes just now."""
    times = {checkpoint: _changed_at(checkpoint) for checkpoint in folder.absolute().glob("*.ckpt")}
    return {(checkpoint, changed_at) for checkpoint, changed_at in times.items() if changed_at is not None}


def _still_there(entry: tuple[Path, int]) -> bool:
    checkpoint, changed_at = entry
    return _changed_at(checkpoint) == changed_at


def _changed_at(checkpoint: Path) -> int | None:
    try:
        return checkpoint.stat().st_mtime_ns
    except FileNotFoundError:
        return None
