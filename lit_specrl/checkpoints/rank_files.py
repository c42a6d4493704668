"""The stores of each rank as files beside the checkpoints."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from lit_specrl.checkpoints.atomic_files import atomic_file
from lit_specrl.checkpoints.locks import hold, is_held, let_go, sweep
from lit_specrl.checkpoints.tensor_file import RejectedFileError

S = TypeVar("S")

PREFIX_CACHE, DRAFTER_SAMPLES = "prefix_cache", "drafter_lessons"
"""Folders of the files."""
_KEYS = {PREFIX_CACHE: "prefix_cache", DRAFTER_SAMPLES: "drafter_distillation"}  # in a checkpoint, what needs the files
_NAME = re.compile(r"step-(\d+)-(?:rank\d+-)?of-(\d+)\.")


class Place(NamedTuple):
    """When files were written; those of all ranks belong together."""

    step: int
    world_size: int


class Store(Protocol):
    """What can be written."""

    def save(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        """Write a file that is whole at any moment."""


class RankFiles:
    """Writes the files of a rank beside checkpoints, and deletes those that no checkpoint needs.

    A checkpoint says which files it needs. Checkpoints in the folder are read for it; of one that lies elsewhere, the
    files keep a record (see `record`). A file is written just before its checkpoint, and held by the process until a
    checkpoint needs it, so that another run in the folder leaves it alone.

    Args:
        name: of the folder of the files, beside the checkpoints.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._needs: dict[tuple[Path, int], Place | None] = {}  # what a checkpoint of a time of change needs
        self._held: dict[Path, int] = {}  # descriptors

    def save(
        self,
        folder: Path,
        store: Store,
        identity: dict[str, str],
        *,
        step: int,
        rank: int,
        world_size: int,
        is_recorded: bool = True,
    ) -> None:
        """Delete the files that no checkpoint needs, and write this one.

        Args:
            folder: where the checkpoints are; the files are in a folder of their own in it.
            store: what is written.
            identity: what its token ids and log-probs belong to.
            step: training step.
            rank: this rank; the first one deletes.
            world_size: number of ranks.
            is_recorded: whether `record` will learn where the checkpoint lies; otherwise the file stays until a
                checkpoint in this folder has needed it.
        """
        self.sweep(folder, rank)
        path = rank_file(folder / self.name, step, rank, world_size)
        with atomic_file(path) as partial:
            store.save(partial, identity)
            descriptor = hold(partial)
        self._let_go(path)
        if descriptor is not None:
            self._held[path] = descriptor
        if not is_recorded:
            _append(path.parent, Place(step, world_size), _SOMEWHERE)

    def sweep(self, folder: Path, rank: int) -> None:
        """Delete the files that no checkpoint needs and no living process has just written.

        What an unreadable checkpoint needs is unknown: no file that is older than it is deleted.
        """
        needed, unreadable_at = self._needed(folder)
        for path in [path for path in self._held if _place(path) in needed]:
            self._let_go(path)
        if rank != 0:
            return
        files: dict[Place, list[Path]] = {}
        for path in sorted((folder / self.name).glob("step-*")):
            place = _place(path)
            if place is not None and place not in needed:
                files.setdefault(place, []).append(path)
        for paths in files.values():
            if any(_changed_at(path) <= unreadable_at or is_held(path) for path in paths):
                continue
            sweep(paths)

    def close(self, folder: Path, rank: int) -> None:
        """Delete what no checkpoint needs, when the run has ended."""
        self.sweep(folder, rank)
        self._let_go_of_all()

    def _let_go_of_all(self) -> None:
        for path in list(self._held):
            self._let_go(path)

    __del__ = _let_go_of_all

    def _let_go(self, path: Path) -> None:
        descriptor = self._held.pop(path, None)
        if descriptor is not None:
            let_go(descriptor)

    def _needed(self, folder: Path) -> tuple[set[Place], int]:
        """What checkpoints need, and when the newest unreadable one was changed."""
        records = list(_records(folder / self.name))
        near, unreadable_at = self._needed_by(set(folder.absolute().glob("*.ckpt")))
        far, unreadable_elsewhere_at = self._needed_by({Path(path) for _, path in records if "://" not in path})
        for place in {place for place, path in records if path == _SOMEWHERE} & near:  # that was it
            _record_file(folder / self.name, place).unlink(missing_ok=True)
        # an address, which is not looked up, or a folder that is gone, perhaps with its disk
        addressed = {place for place, path in records if "://" in path or not Path(path).parent.is_dir()}
        return near | far | addressed, max(unreadable_at, unreadable_elsewhere_at)

    def _needed_by(self, checkpoints: set[Path]) -> tuple[set[Place], int]:
        needed, unreadable_at = set[Place](), -1
        for checkpoint in checkpoints:
            changed_at = _changed_at(checkpoint)
            try:
                if changed_at >= 0 and (checkpoint, changed_at) not in self._needs:
                    self._needs[checkpoint, changed_at] = _need(checkpoint, _KEYS[self.name])
            except Exception:  # damaged, of another kind, or not for us to read
                unreadable_at = max(unreadable_at, changed_at)
            place = self._needs.get((checkpoint, changed_at))
            needed |= set() if place is None else {place}
        return needed, unreadable_at


def record(checkpoint: dict[str, Any], path: Path | str) -> None:
    """Note beside the files that a checkpoint needs where it will lie, if that is elsewhere.

    Args:
        checkpoint: its content.
        path: of the checkpoint, or its address.
    """
    for name, key in _KEYS.items():
        state = checkpoint.get(key)
        if state is None:
            continue
        folder, is_remote = Path(state["folder"]), "://" in str(path)
        if not is_remote and Path(path).suffix == ".ckpt" and Path(path).parent.absolute() == folder:
            continue
        if (folder / name).is_dir():
            place = Place(state["step"], state["world_size"])
            _append(folder / name, place, str(path if is_remote else Path(path).absolute()))


_ELSEWHERE, _SOMEWHERE = ".elsewhere", "somewhere://"


def _append(files: Path, place: Place, line: str) -> None:
    with _record_file(files, place).open("a") as file:
        file.write(f"{line}\n")


def _record_file(files: Path, place: Place) -> Path:
    return files / f"step-{place.step:08d}-of-{place.world_size}{_ELSEWHERE}"


def _records(files: Path) -> Iterator[tuple[Place, str]]:
    """Checkpoints that lie elsewhere, as far as files tell."""
    for path in files.glob(f"step-*{_ELSEWHERE}"):
        place = _place(path)
        if place is not None:
            yield from ((place, line) for line in path.read_text().splitlines() if line)


def _need(checkpoint: Path, key: str) -> Place | None:
    """Which files a checkpoint needs; its tensors are not read."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(key)
    return None if state is None else Place(state["step"], state["world_size"])


def _place(path: Path) -> Place | None:
    """From the name of a file, whatever was appended to it."""
    match = _NAME.match(path.name)
    return None if match is None else Place(int(match[1]), int(match[2]))


def load_ranks(
    folders: Sequence[Path],
    ranks: Sequence[int],
    read: Callable[[Path], S],
    complaint: str,
    *,
    step: int,
    world_size: int,
) -> list[S]:
    """Read the files of several ranks; a missing or damaged one is warned about and left out.

    Args:
        folders: of files, searched in this order.
        ranks: whose files.
        read: reads one of them.
        complaint: the warning, with places for `{rank}` and `{error}`.
        step: training step that they were written in.
        world_size: number of ranks at that time.
    """
    found = []
    for rank in ranks:
        paths = [rank_file(folder, step, rank, world_size) for folder in folders]
        path = next((path for path in paths if path.exists()), paths[0])
        try:
            found.append(read(path))
        except (OSError, RejectedFileError) as error:
            warnings.warn(complaint.format(rank=rank, error=error), stacklevel=2)
    return found


def rank_file(folder: Path, step: int, rank: int, world_size: int) -> Path:
    """Of a rank, written at a step."""
    return folder / f"step-{step:08d}-rank{rank}-of-{world_size}.safetensors"


def _changed_at(path: Path) -> int:
    """-1 for what is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1
