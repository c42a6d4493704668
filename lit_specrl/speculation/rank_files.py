"""The caches of all ranks as files beside the checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from lit_specrl.speculation.store import RolloutStore
from lit_specrl.speculation.tensor_file import RejectedFileError

FOLDER = "prefix_cache"
"""Folder of the files, beside the checkpoints."""


class RankFiles:
    """Writes the cache of a rank beside checkpoints, and deletes it again when its checkpoints are gone.

    A cache is written just before its checkpoint, whose name is not known by then. So the checkpoints that are new at the next write are
    those of the last one; a cache that no checkpoint of the folder appeared for (it lies elsewhere) is never deleted.
    """

    def __init__(self) -> None:
        self._checkpoints: dict[Path, set[tuple[Path, int]]] = {}  # file -> (checkpoint, time of its last change)
        self._seen: set[tuple[Path, int]] = set()
        self._latest: Path | None = None

    def save(
        self, folder: Path, store: RolloutStore, identity: dict[str, str], *, step: int, rank: int, world_size: int
    ) -> None:
        """Delete the caches whose checkpoints are gone, and write this one.

        Args:
            folder: where the checkpoints are; the caches are in a folder of their own in it.
            store: what is written.
            identity: what its token ids and log-probs belong to.
            step: training step.
            rank: this rank.
            world_size: number of ranks.
        """
        self.prune(folder)
        path = _path(folder, step, rank, world_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.save(path, identity)
        self._latest = path
        self._checkpoints.setdefault(path, set())

    def prune(self, folder: Path) -> None:
        """Delete the caches whose checkpoints were in the folder and are gone."""
        present = _present(folder)
        if self._latest is not None:
            self._checkpoints[self._latest] |= present - self._seen
        self._latest, self._seen = None, present
        for file in [file for file, own in self._checkpoints.items() if own and not any(map(_still_there, own))]:
            file.unlink(missing_ok=True)
            del self._checkpoints[file]

    def adopt(self, checkpoint: Path, *, step: int, rank: int, world_size: int) -> None:
        """Remember the cache that a resumed run was saved with, so that it goes with its checkpoint.

        Args:
            checkpoint: that the run was resumed from.
            step: training step of the checkpoint.
            rank: this rank.
            world_size: number of ranks at that time.
        """
        own = {entry for entry in _present(checkpoint.parent) if entry[0].name == checkpoint.name}
        self._checkpoints[_path(checkpoint.parent.absolute(), step, rank, world_size)] = own


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
        paths = [_path(folder, step, rank, world_size) for folder in folders]
        path = next((path for path in paths if path.exists()), paths[0])
        try:
            stores.append(RolloutStore.load(path, identity))
        except (FileNotFoundError, RejectedFileError) as error:
            warnings.warn(
                f"the prefix cache of rank {rank} cannot be used, its prompts are generated afresh once: {error}",
                stacklevel=2,
            )
    return RolloutStore.merge(stores, max_bytes)


def _path(folder: Path, step: int, rank: int, world_size: int) -> Path:
    return folder / FOLDER / f"step-{step:08d}-rank{rank}-of-{world_size}.safetensors"


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
