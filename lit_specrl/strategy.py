"""Sharded data parallelism by one word: `Trainer(strategy="fsdp2")`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all ranks in one data-parallel group.

    The strategy's own defaults mean tensor parallelism within a node. Checkpoints are folders with a file per rank unless
    `save_distributed_checkpoint` is False.

    Args:
        save_distributed_checkpoint: every rank writes its shard; otherwise rank 0 writes one file.
        options: further arguments of `ModelParallelStrategy`.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        if self._process_group_backend is None and self.root_device.type == "cpu":
            self._process_group_backend = "gloo"
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks")
