"""What a run is going to do, in one table before it begins."""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Table

from lit_specrl.algorithms.micro_batch_size import DEFAULT_MICRO_BATCH_TOKENS
from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rollout_callback import RolloutCallback, callbacks_of, require_rlvr_module
from lit_specrl.engines import TransformersEngine
from lit_specrl.experience import Experience
from lit_specrl.models.memory import ModelSize, device_memory, model_size, training_memory
from lit_specrl.models.model_name import full_name
from lit_specrl.precision import fast_dtype
from lit_specrl.types import Rollouts

_FEATURES = ("PrefixCache", "SpeculativeRollout", "AdaptiveScheduler", "DrafterDistillation")


class RunPlan(RolloutCallback):
    """Prints, before the model is loaded, the arithmetic of a step, the memory of a rank, the engine, and what is on
    and off.

    Warns when the memory that is known beforehand exceeds the device's. Activations and the engine's working memory are
    not known.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = require_rlvr_module(self, pl_module)
        module.check_run(stage)  # here as well, so that what is wrong is not told below the table
        self._tells_micro_batches = False
        if trainer.state.fn == TrainerFn.FITTING:
            self._tells_micro_batches = module.micro_batch_tokens is None
            self._report(trainer, module)

    @rank_zero_only
    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        """Tell the size of micro-batches where the table could not."""
        if self._tells_micro_batches and trainer.strategy.root_device.type == "cuda":
            Console().print(f"micro-batches: {pl_module.micro_batch_tokens} tokens")
        self._tells_micro_batches = False

    @rank_zero_only
    def _report(self, trainer: L.Trainer, module: RLVRModule) -> None:
        size = model_size(module.model_name, module.lora)
        memory = memory_of_a_rank(trainer, module, size)
        present = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
        table = Table("", "", title="the run", show_header=False)
        rows = {
            "policy": _policy(module, size),
            **_arithmetic(trainer, module),
            "memory of a rank": _memory(memory),
            "engine": TransformersEngine().describe(trainer.strategy.root_device),  # if no callback brings another
            "ranks": f"{trainer.world_size} x {trainer.strategy.root_device.type}, {type(trainer.strategy).__name__}",
            "precision": f"{trainer.precision} ({fast_dtype(trainer.strategy.root_device).reason})",
            "on": ", ".join(name for name in _FEATURES if name in present) or "-",
            "off": ", ".join(name for name in _FEATURES if name not in present) or "-",
            "versions": _versions(),
        }
        for callback in callbacks_of(trainer, RolloutCallback):
            rows |= callback.describe(trainer)
        for name, value in rows.items():
            table.add_row(name, value)
        Console().print(table)
        device = trainer.strategy.root_device
        needed = sum(memory.values()) * (trainer.world_size if device.type == "cpu" else 1)  # ranks share the host
        if needed > device_memory(device):
            rank_zero_warn(
                f"the run needs at least {_gib(needed)} GiB, {device} has {_gib(device_memory(device))}: use "
                "strategy='fsdp2' over more devices, lora, a smaller model, or less for the engine "
                "(gpu_memory_utilization, cpu_kv_cache_gib)"
            )


def memory_of_a_rank(trainer: L.Trainer, module: RLVRModule, size: ModelSize) -> dict[str, int]:
    """Bytes that a rank will hold on its device, by purpose, as far as that is known before the run."""
    dtype, one = getattr(torch, module.model_options["dtype"]), [torch.nn.Parameter(torch.zeros(1))]
    num_shards = trainer.world_size if module.is_sharded else 1
    num_references = int(module.kl_coefficient.value > 0 and module.lora is None)
    parts = training_memory(size, dtype, module.make_optimizer(one), num_shards, num_references)
    if module.critic is not None and not module.critic.updates_with_policy:
        critic_size = model_size(getattr(module.critic, "model", None) or module.model_name)
        parts["critic"] = sum(
            training_memory(critic_size, dtype, module.critic.make_optimizer(one), num_shards).values()
        )
    if getattr(trainer.strategy, "cpu_offload", False) and trainer.strategy.root_device.type != "cpu":
        parts = {}  # they wait on the host
    for callback in callbacks_of(trainer, RolloutCallback):
        parts |= callback.memory(trainer, size.num_parameters)
    return parts


def _policy(module: RLVRModule, size: ModelSize) -> str:
    trained = (
        "" if size.num_trained == size.num_parameters else f", {size.num_trained / 1e6:,.1f} M of them trained (LoRA)"
    )
    return f"{full_name(module.model_name)}, {size.num_parameters / 1e6:,.1f} M parameters, {module.model_options['dtype']}{trained}"


def _arithmetic(trainer: L.Trainer, module: RLVRModule) -> dict[str, str]:
    data: Any = getattr(trainer, "datamodule", None)
    sampling, batch_size = module.sampling, getattr(data, "batch_size", None)
    rows = {
        "responses": f"{sampling.num_generations} a prompt of up to {sampling.max_completion_length} tokens, temperature {sampling.temperature:g}"
        + ("" if module.environment is None else f", up to {module.worker.max_turns} turns"),
        "micro-batches": _micro_batches(trainer, module),
    }
    if batch_size is None:
        return rows
    rollouts = batch_size * sampling.num_generations
    updates = module.num_iterations * module.num_minibatches
    per_rank = "" if trainer.world_size == 1 else f" ({rollouts // trainer.world_size} a rank)"
    rows["a step"] = (
        f"{batch_size} prompts x {sampling.num_generations} = {rollouts} rollouts{per_rank}; {module.num_iterations} "
        f"passes x {module.num_minibatches} minibatches = {updates} updates of {rollouts // module.num_minibatches} "
        "rollouts"
    )
    num_steps = _num_steps(trainer, data, updates)
    if num_steps is not None:
        rows["the run"] = f"{num_steps[0]} steps, {num_steps[1]} an epoch of {data.num_train_prompts} prompts"
        if trainer.max_steps >= 0 and updates > 1:
            rows["the run"] += f"; max_steps={trainer.max_steps} counts updates of the policy, {updates} a step"
    return rows


def _micro_batches(trainer: L.Trainer, module: RLVRModule) -> str:
    if module.micro_batch_tokens is None and trainer.strategy.root_device.type == "cuda":
        return "chosen in the first step, from the memory that is free once the engine has started"
    return f"{module.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS} tokens"


def _num_steps(trainer: L.Trainer, data: Any, num_updates: int) -> tuple[int, int] | None:
    """Steps of the run and of an epoch, where both are known; `max_steps` of Lightning is of the policy's updates."""
    if getattr(data, "num_train_prompts", None) is None:
        return None
    per_epoch = data.num_train_prompts // data.batch_size
    limit = trainer.limit_train_batches
    per_epoch = min(per_epoch, limit) if isinstance(limit, int) else int(per_epoch * limit)
    bounds = [math.ceil(trainer.max_steps / num_updates)] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * per_epoch)
    return (min(bounds), per_epoch) if bounds else None


def _memory(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"{_gib(sum(parts.values()))} GiB and activations: {listed}"


def _gib(num_bytes: float) -> str:
    digits = 2 if num_bytes < 2**30 else 1
    return f"{math.ceil(num_bytes / 2**30 * 10**digits) / 10**digits:.{digits}f}"


def _versions() -> str:
    return ", ".join(
        f"{name} {metadata.version(name)}" for name in ("lit_specrl", "torch", "transformers", "lightning")
    )
