"""Sharded data parallelism by one word: `Trainer(strategy="fsdp2")`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from lit_specrl.checkpoints.atomic_files import partial_folder, replace_atomically, telling_of_a_full_disk
from lit_specrl.checkpoints.checksums import write_checksums
from lit_specrl.checkpoints.content import loadable
from lit_specrl.checkpoints.integrity import OF_ALL_RANKS, check_checkpoint, check_content, naming
from lit_specrl.checkpoints.rank_files import record
from lit_specrl.distributed.collectives import gather_objects

_SHARDED = ("state_dict", "optimizer_states")  # tensors in a file per rank


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks in one data-parallel group.

    The strategy's own defaults mean tensor parallelism within a node. Checkpoints are folders with a file per rank,
    written under another name first, unless `save_distributed_checkpoint` is False.

    Args:
        save_distributed_checkpoint: every rank writes its shard; otherwise rank 0 writes one file.
        cpu_offload: keep weights, gradients and the optimizer's moments on the host, and update them there; a layer at
            a time comes to the device.
        options: further arguments of `ModelParallelStrategy`.

    Raises:
        ValueError: for tensor parallelism in training, which the policy does not know.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, cpu_offload: bool = False, **options: Any) -> None:
        for name, expected in {"tensor_parallel_size": 1, "data_parallel_size": "auto"}.items():
            if options.pop(name, expected) != expected:
                raise ValueError(
                    f"fsdp2 shards over all ranks and knows no {name}; leave it out. The engine can be tensor "
                    "parallel: VLLMEngine(tensor_parallel_size=...)"
                )
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **options)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        if self._process_group_backend is None:
            if self.root_device.type == "cpu":
                self._process_group_backend = "gloo"
            elif self.cpu_offload:
                self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are added up on the host
        super().setup_environment()

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        content = loadable({name: value for name, value in checkpoint.items() if name not in _SHARDED})
        sharded = {name: checkpoint[name] for name in _SHARDED if name in checkpoint}
        with partial_folder(path) if self.is_global_zero else nullcontext(path) as folder:
            partial = Path(self.broadcast(folder)) / path.name
            with telling_of_a_full_disk(path, partial):
                super().save_checkpoint(content | sharded, partial, storage_options)
                self._write_checksums(partial)
            self.barrier()
            if self.is_global_zero:
                record(content, path)
                replace_atomically(partial, path)
            self.barrier()

    def _write_checksums(self, folder: Path) -> None:
        own = [*folder.glob(f"__{self.global_rank}_*")]
        if self.is_global_zero:
            own += [folder / ".metadata", folder / OF_ALL_RANKS]
        write_checksums(folder, own, f"checksums-{self.global_rank}.json")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        found = ""
        try:
            check_checkpoint(path, self.global_rank, self.world_size)
        except ValueError as error:
            found = str(error)
        errors = [error for error in gather_objects(found) if error]
        if errors:  # on all ranks, or the others would wait
            raise ValueError(errors[0])
        with naming(path):
            content = super().load_checkpoint(path, weights_only)
            check_content(content)
        return content


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks")


def sharding(trainer: L.Trainer) -> dict[str, Any]:
    """How models are sharded: arguments of `torch.distributed.fsdp.fully_shard`.

    With `precision="bf16-mixed"`, weights travel and compute in bfloat16; those that the optimizer owns, and the sums
    of gradients, are float32.

    Args:
        trainer: with a `ModelParallelStrategy`.
    """
    strategy: Any = trainer.strategy
    options: dict[str, Any] = {"mesh": strategy.device_mesh["data_parallel"]}
    if getattr(strategy, "cpu_offload", False):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=strategy.root_device.type == "cuda")
    if trainer.precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return options
