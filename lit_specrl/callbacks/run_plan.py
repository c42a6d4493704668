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

from lit_specrl.algorithms.rlvr import RLVRModule, require_rlvr_module
from lit_specrl.callbacks.adaptive_scheduler import AdaptiveScheduler
from lit_specrl.callbacks.drafter_distillation import DrafterDistillation
from lit_specrl.callbacks.prefix_cache import PrefixCache
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.callbacks.speculative_rollout import SpeculativeRollout
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.models.critic import SeparateCritic
from lit_specrl.models.memory import ModelSize, device_memory, model_size, training_memory
from lit_specrl.precision import fast_dtype

_FEATURES = (PrefixCache, SpeculativeRollout, AdaptiveScheduler, DrafterDistillation)


class RunPlan(RolloutCallback):
    """Prints, before the model is loaded, the arithmetic of a step, the memory of a rank, the engine, and what is on and off.

    Warns when the memory that is known beforehand exceeds the device's. Activations and the engine's working memory are not known.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = require_rlvr_module(self, pl_module)
        module.check_run(stage)  # here as well, so that what is wrong is not told below the table
        if trainer.state.fn == TrainerFn.FITTING:
            self._report(trainer, module)

    @rank_zero_only
    def _report(self, trainer: L.Trainer, module: RLVRModule) -> None:
        size = model_size(module.model_name, module.lora)
        memory = memory_of_a_rank(trainer, module, size)
        table = Table("", "", title="the run", show_header=False)
        rows = {
            "policy": _policy(module, size),
            **_arithmetic(trainer, module),
            "memory of a rank": _memory(memory),
            "engine": _engine(trainer),
            "ranks": f"{trainer.world_size} x {trainer.strategy.root_device.type}, {type(trainer.strategy).__name__}",
            "precision": f"{trainer.precision} ({fast_dtype(trainer.strategy.root_device).reason})",
            "on": ", ".join(kind.__name__ for kind in _FEATURES if _has(trainer, kind)) or "-",
            "off": ", ".join(kind.__name__ for kind in _FEATURES if not _has(trainer, kind)) or "-",
            "versions": _versions(),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        Console().print(table)
        device = trainer.strategy.root_device
        needed = sum(memory.values()) * (trainer.world_size if device.type == "cpu" else 1)  # ranks share the host
        if needed > device_memory(device):
            rank_zero_warn(
                f"the run needs at least {_gib(needed)} GiB, {device} has {_gib(device_memory(device))}: use strategy='fsdp2' over more devices, "
                "lora, a smaller model, or less for the engine (gpu_memory_utilization, cpu_kv_cache_gib)"
            )


def memory_of_a_rank(trainer: L.Trainer, module: RLVRModule, size: ModelSize) -> dict[str, int]:
    """Bytes that a rank will hold, by purpose, as far as that is known before the run."""
    dtype, one = getattr(torch, module.model_options["dtype"]), [torch.nn.Parameter(torch.zeros(1))]
    num_shards = trainer.world_size if module.is_sharded else 1
    num_references = int(module.kl_coefficient.value > 0 and module.lora is None)
    parts = training_memory(size, dtype, module.make_optimizer(one), num_shards, num_references)
    if isinstance(module.critic, SeparateCritic):
        critic_size = model_size(module.critic.model or module.model_name)
        parts["critic"] = sum(
            training_memory(critic_size, dtype, module.critic.make_optimizer(one), num_shards).values()
        )
    engine = _find(trainer, SpeculativeRollout)
    if isinstance(engine, SpeculativeRollout) and isinstance(engine.engine, VLLMEngine):
        parts["engine"] = engine.engine.memory(size.num_parameters, trainer.strategy.root_device)
    cache, learner = _find(trainer, PrefixCache), _find(trainer, DrafterDistillation)
    if trainer.strategy.root_device.type == "cpu":  # elsewhere these are on the host
        if isinstance(cache, PrefixCache):
            parts["prefix cache, at most"] = cache.store.max_bytes or 0
        if isinstance(learner, DrafterDistillation):
            parts["drafter's lessons, at most"] = learner.samples.max_bytes
    return parts


def _policy(module: RLVRModule, size: ModelSize) -> str:
    trained = (
        "" if size.num_trained == size.num_parameters else f", {size.num_trained / 1e6:,.1f} M of them trained (LoRA)"
    )
    return (
        f"{module.model_name}, {size.num_parameters / 1e6:,.1f} M parameters, {module.model_options['dtype']}{trained}"
    )


def _arithmetic(trainer: L.Trainer, module: RLVRModule) -> dict[str, str]:
    data: Any = getattr(trainer, "datamodule", None)
    sampling, batch_size = module.sampling, getattr(data, "batch_size", None)
    rows = {
        "responses": f"{sampling.num_generations} a prompt of up to {sampling.max_completion_length} tokens, temperature {sampling.temperature:g}",
        "micro-batches": f"{module.micro_batch_tokens} tokens",
    }
    if batch_size is None:
        return rows
    rollouts = batch_size * sampling.num_generations
    updates = module.num_iterations * module.num_minibatches
    per_rank = "" if trainer.world_size == 1 else f" ({rollouts // trainer.world_size} a rank)"
    rows["a step"] = (
        f"{batch_size} prompts x {sampling.num_generations} = {rollouts} rollouts{per_rank}; {module.num_iterations} passes x "
        f"{module.num_minibatches} minibatches = {updates} updates of {rollouts // module.num_minibatches} rollouts"
    )
    num_steps = _num_steps(trainer, data)
    if num_steps is not None:
        rows["the run"] = f"{num_steps[0]} steps, {num_steps[1]} an epoch of {data.num_train_prompts} prompts"
    return rows


def _num_steps(trainer: L.Trainer, data: Any) -> tuple[int, int] | None:
    """Steps of the run and of an epoch, where both are known."""
    if getattr(data, "num_train_prompts", None) is None:
        return None
    per_epoch = data.num_train_prompts // data.batch_size
    limit = trainer.limit_train_batches
    per_epoch = min(per_epoch, limit) if isinstance(limit, int) else int(per_epoch * limit)
    bounds = [bound for bound in (trainer.max_steps,) if bound >= 0]
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * per_epoch)
    return (min(bounds), per_epoch) if bounds else None


def _memory(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"{_gib(sum(parts.values()))} GiB and activations: {listed}"


def _gib(num_bytes: float) -> str:
    digits = 2 if num_bytes < 2**30 else 1
    return f"{math.ceil(num_bytes / 2**30 * 10**digits) / 10**digits:.{digits}f}"


def _engine(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    owner = _find(trainer, SpeculativeRollout)
    if not isinstance(owner, SpeculativeRollout):
        return TransformersEngine().describe(device)  # what the module takes where it was given none
    drafter = (
        ""
        if owner.drafter is None
        else f", up to {owner.drafter.num_speculative_tokens} tokens by {type(owner.drafter).__name__}"
    )
    return f"{owner.engine.describe(device)}{drafter}"


def _versions() -> str:
    return ", ".join(
        f"{name} {metadata.version(name)}" for name in ("lit_specrl", "torch", "transformers", "lightning")
    )


def _find(trainer: L.Trainer, kind: type[L.Callback]) -> L.Callback | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def _has(trainer: L.Trainer, kind: type[L.Callback]) -> bool:
    return _find(trainer, kind) is not None
