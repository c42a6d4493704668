"""Finished rows of a rollout on the disk, so that an interrupted one is not lost."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rank_store import checkpoint_folder
from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_only_one, require_rlvr_module
from lit_specrl.checkpoints.journal_file import JournalFile, read_journal
from lit_specrl.checkpoints.locks import sweep
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.experience import Experience
from lit_specrl.types import Continuation, FinishReason, RolloutRequest, Rollouts

FOLDER = "rollout_journal"
"""Beside the checkpoints."""
_REASONS: tuple[FinishReason, ...] = ("stop", "length")
_HEAD = struct.Struct("<BB")  # finish reason, bytes of a log-prob
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RolloutJournal(RolloutCallback):
    """Writes each row of a training rollout to the disk when it is finished; a resumed run does not generate it again.

    A run that is killed in the middle of a rollout goes on from its last checkpoint. When it comes to the step of the
    journal, and weights, settings and seeds are the same to the bit, the rows found are taken as they are, with their
    log-probs, and the others are generated. A journal of other weights or settings is told of and left out.

    The journals of all steps since the last checkpoint but one are kept, so that what lies between a checkpoint and the
    interruption is not generated again either. Where training does not repeat itself to the bit, as on most GPUs, that
    holds for the step behind the checkpoint alone.

    Rows that the engine verifies itself (`PrefixCache(verifier="engine")`) and rollouts of evaluation are not kept.

    Args:
        sync_interval_s: seconds after which what was written is brought to the disk, in the background. The end of the
            process loses nothing, that of the machine at most the rows of this time.
        max_bytes: most bytes of journals of each rank; those of the oldest steps make room.
        load_rows: take rows of an interrupted run; False generates all of them.

    Raises:
        ValueError: an argument out of its range.

    Example::

        RolloutJournal(sync_interval_s=30)
    """

    def __init__(self, sync_interval_s: float = 10.0, max_bytes: int = 2**30, load_rows: bool = True) -> None:
        if sync_interval_s <= 0:
            raise ValueError(f"sync_interval_s must be positive, got {sync_interval_s}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.sync_interval_s, self.max_bytes, self.load_rows = sync_interval_s, max_bytes, load_rows
        self._file: JournalFile | None = None
        self._closing: JournalFile | None = None
        self._found: dict[bytes, bytes] = {}
        self.is_open = False
        """Whether the file of this step was opened, or could not be."""
        self._synced_at = 0.0
        self._num_taken = 0
        self._saved_steps = [0, 0]  # of the last two checkpoints

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_rlvr_module(self, pl_module)
        require_only_one(self, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        self._saved_steps = [pl_module.step] * 2
        self._sweep(trainer, before=pl_module.step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: RLVRModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self._close()
        self._num_taken = 0
        self._make_room(trainer)

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        if trainer.training:
            request.journal = _StepJournal(self, trainer, pl_module)

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        self._close()
        pl_module.step_metrics["rollout_journal/taken_rows"] = float(sum(gather_objects(self._num_taken)))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        step = require_rlvr_module(self, pl_module).step
        if step != self._saved_steps[-1]:
            self._saved_steps = [self._saved_steps[-1], step]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(wait=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete the journals: the run has come to its end."""
        self._close(wait=True)
        self._sweep(trainer, before=require_rlvr_module(self, pl_module).step)

    # ----------------------------------------------------------------------------------------------------- of the rows

    def find(self, keys: Mapping[int, bytes]) -> dict[int, Continuation]:
        """Rows of an interrupted run, by the key of each."""
        found = {row: _decoded(self._found[key]) for row, key in keys.items() if key in self._found}
        self._num_taken += len(found)
        return found

    def keep(self, finished: Mapping[bytes, Continuation]) -> None:
        """Write finished rows; a disk that takes none is told of, and the step goes on without a journal."""
        if self._file is None:
            return
        try:
            self._file.append({key: _encoded(row) for key, row in finished.items()})
        except OSError as error:
            rank_zero_warn(f"RolloutJournal keeps no more rows of this step: {error}")
            self._close_file()
            return
        if time.monotonic() >= self._synced_at + self.sync_interval_s:
            self._synced_at = time.monotonic()
            self._file.sync()

    def open(self, trainer: L.Trainer, step: int, identity: dict[str, str]) -> None:
        """Open the file of a step, and find what an interrupted run has left there.

        Args:
            trainer: of the run.
            step: training step.
            identity: what decides the rows of the step, besides prompts and seeds.
        """
        self.is_open, self._synced_at = True, time.monotonic()
        digest = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        path = _folders(trainer)[0] / f"step-{step:08d}-rank{trainer.global_rank}-{digest}.rows"
        try:
            if self.load_rows:
                self._load(trainer, step, identity)
            self._file = JournalFile(path, identity)
            missing = {key: row for key, row in self._found.items() if key not in self._file.found}
            self._file.append(missing)  # found beside the checkpoint, which lies elsewhere
        except OSError as error:
            rank_zero_warn(f"RolloutJournal keeps no rows of this step: {error}")
            self._close_file()

    def _load(self, trainer: L.Trainer, step: int, identity: dict[str, str]) -> None:
        others = []
        for folder in _folders(trainer):
            for other in sorted(folder.glob(f"step-{step:08d}-rank{trainer.global_rank}-*.rows")):
                found_identity, rows, _ = read_journal(other)
                if found_identity == identity:
                    self._found |= rows
                elif rows:
                    others.append(found_identity or {})
        if self._found:
            rank_zero_info(f"step {step}: {len(self._found)} finished rows of an interrupted run are at hand")
        elif others:
            names = [name for name, value in identity.items() if others[-1].get(name) != value]
            rank_zero_warn(
                f"step {step}: the rollout journal beside the checkpoints is not used, it was written with other "
                f"{', '.join(names)}; all rows are generated"
            )

    # ---------------------------------------------------------------------------------------------------- of the files

    def _close(self, wait: bool = False) -> None:
        self._close_file(wait)
        self._found, self.is_open = {}, False

    def _close_file(self, wait: bool = False) -> None:
        if self._file is not None:
            self._file.close()
            self._closing, self._file = self._file, None
        if wait and self._closing is not None:
            self._closing.wait()

    def _make_room(self, trainer: L.Trainer) -> None:
        """Delete this rank's journals of steps before the last checkpoint but one, and the oldest beyond the limit."""
        num_bytes = 0
        for path in sorted(_folders(trainer)[0].glob(f"step-*-rank{trainer.global_rank}-*.rows"), reverse=True):
            with suppress(FileNotFoundError):  # another run in the folder has just deleted it
                num_bytes += path.stat().st_size
            if num_bytes > self.max_bytes or _step(path) < self._saved_steps[0]:
                sweep([path])

    def _sweep(self, trainer: L.Trainer, before: int) -> None:
        """Delete this rank's journals of earlier steps, and on rank 0 those of ranks that are no more."""
        paths = [path for folder in _folders(trainer) for path in folder.glob("step-*.rows") if _step(path) < before]
        sweep(path for path in paths if _owner(path, trainer.world_size) == trainer.global_rank)


class _StepJournal:
    """The journal of the requests of a step (a `RowJournal`)."""

    def __init__(self, journal: RolloutJournal, trainer: L.Trainer, module: RLVRModule) -> None:
        self._journal, self._trainer, self._module = journal, trainer, module

    def find(self, request: RolloutRequest, rows: Sequence[int]) -> dict[int, Continuation]:
        if not self._journal.is_open:
            self._journal.open(self._trainer, self._module.step, _identity(self._trainer, self._module, request))
        return self._journal.find({row: _key(request, row) for row in rows if row not in request.cached_responses})

    def keep(self, request: RolloutRequest, finished: Mapping[int, Continuation]) -> None:
        rows = {row: answer for row, answer in finished.items() if row not in request.cached_responses}
        self._journal.keep({_key(request, row): answer for row, answer in rows.items()})


def _identity(trainer: L.Trainer, module: RLVRModule, request: RolloutRequest) -> dict[str, str]:
    """What decides a row besides its prompt, prefix and seed; names as they are told to the user."""
    assert module.policy is not None and module.engine is not None
    sampling = asdict(request.sampling)
    del sampling["num_generations"]
    weights = fingerprint(module.policy.model)
    return {
        "number of ranks": str(trainer.world_size),
        "policy version": str(request.policy_version),
        "weights": "/".join(gather_objects(weights) if module.is_sharded else [weights]),
        "model options": str(module.model_options),
        "precision": str(trainer.precision),
        "sampling settings": str(sampling),
        "engine": f"{module.engine.describe(module.device)}, ends at {sorted(module.engine.stop_token_ids)}",
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash of the parameters of this rank, which another set of weights does not have.

    On a GPU the bits of each parameter are added up as integers, so that a number per parameter is copied to the host.
    (Entries that are only permuted have the same sum there; no update does that.)
    """
    digest, sums = xxhash.xxh3_64(), []
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.device.type == "cpu":
            digest.update(local.detach().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sums.append(local.detach().view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64))
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _key(request: RolloutRequest, row: int) -> bytes:
    """Of a row, by its seed, prompt and prefix."""
    prompt, prefix = request.prompts.prompt_ids[request.prompt_index(row)], request.prefix(row)
    numbers = np.array([request.seeds[row], len(prompt), *prompt, *prefix], dtype=np.int64)
    return xxhash.xxh3_128_digest(numbers.tobytes())


def _encoded(row: Continuation) -> bytes:
    """8 bytes a token: its id, and its log-prob as float32, or as float64 (12 bytes) where that is more than one."""
    logprobs = np.array(row.logprobs, dtype=np.float32)
    if not np.array_equal(logprobs, np.array(row.logprobs, dtype=np.float64), equal_nan=True):
        logprobs = np.array(row.logprobs, dtype=np.float64)  # type: ignore[assignment]
    head = _HEAD.pack(_REASONS.index(row.finish_reason), logprobs.itemsize)
    return head + np.array(row.token_ids, dtype=np.int32).tobytes() + logprobs.tobytes()


def _decoded(data: bytes) -> Continuation:
    reason, size = _HEAD.unpack_from(data)
    length = (len(data) - _HEAD.size) // (4 + size)
    token_ids = np.frombuffer(data, np.int32, length, _HEAD.size)
    logprobs = np.frombuffer(data, f"f{size}", length, _HEAD.size + 4 * length)
    return Continuation(token_ids.tolist(), logprobs.tolist(), _REASONS[reason])


def _folders(trainer: L.Trainer) -> list[Path]:
    """Beside the checkpoints of the run, and beside the one resumed from."""
    folders = [checkpoint_folder(trainer)]
    if trainer.ckpt_path:
        folders.append(Path(str(trainer.ckpt_path)).parent.absolute())
    return [folder / FOLDER for folder in dict.fromkeys(folders)]


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _owner(path: Path, world_size: int) -> int:
    """The rank that deletes a journal: its own, or the first for one that is no more."""
    rank = int(path.name.split("-")[2].removeprefix("rank"))
    return rank if rank < world_size else 0
