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
        """Write the cache, then delete those whose checkpoints are gone.

        Args:
            folder: where the checkpoints are; the caches are in a folder of their own in it.
            store: what is written.
            identity: what its token ids and log-probs belong to.
            step: training step.
            rank: this rank.
            world_size: number of ranks.
        """
        path = _path(folder, step, rank, world_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        present = {(checkpoint, checkpoint.stat().st_mtime_ns) for checkpoint in folder.glob("*.ckpt")}
        if self._latest is not None:
            self._checkpoints[self._latest] |= present - self._seen
        store.save(path, identity)
        self._latest, self._seen = path, present
        self._checkpoints.setdefault(path, set())
        gone = [file for file, own in self._checkpoints.items() if own and not own & present and file != path]
        for file in gone:
            file.unlink(missing_ok=True)
            del self._checkpoints[file]


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
