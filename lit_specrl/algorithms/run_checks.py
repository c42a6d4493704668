"""Whether module, trainer and data fit each other, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.engines.base import RolloutEngine
from lit_specrl.environments import Environment
from lit_specrl.losses import ImportanceSampling
from lit_specrl.models.lora import lora_config
from lit_specrl.models.model_files import check_weights
from lit_specrl.models.pretrained import check_model_exists
from lit_specrl.precision import unusable
from lit_specrl.rewards import EnvironmentReward, RewardSet
from lit_specrl.types import SamplingConfig, check_at_least_one


def check_training_sampling(sampling: SamplingConfig, importance_sampling: ImportanceSampling | None) -> None:
    """Refuse settings of training rollouts from which nothing can be learned, or only something biased.

    Raises:
        ValueError: what is wrong.
    """
    if sampling.temperature == 0:
        raise ValueError("temperature must be positive in training, got 0; greedy rollouts of a group are all the same")
    if importance_sampling is not None and sampling.is_truncated:
        raise ValueError(
            f"importance_sampling is biased under {sampling.departure}: the engine's log-probs belong to another "
            "distribution than the policy's; use top_p=1.0, min_p=0.0 and repetition_penalty=1.0 without top_k, or "
            "importance_sampling=None"
        )


def check_environment(environment: Environment | None, rewards: RewardSet) -> None:
    """Refuse what is no environment, and rewards of an environment that is not there.

    Raises:
        TypeError: what is given is no `Environment`.
        ValueError: `EnvironmentReward` without an environment, or one of no threads.
    """
    if environment is not None and not isinstance(environment, Environment):
        raise TypeError(
            f"environment must be an Environment, got {environment!r}; give an instance, such as "
            "CalculatorEnvironment(), which is copied for each row. A class with TRL's reset and tools goes into "
            "ToolEnvironment(environment_factory=...)"
        )
    if environment is not None:
        check_at_least_one(num_threads=environment.num_threads)
    needing = [reward.name for reward in rewards.rewards if isinstance(reward, EnvironmentReward)]
    if environment is None and needing:
        raise ValueError(
            f"reward {needing[0]!r} is what an environment gives; set environment, or leave the reward out"
        )


def check_run(
    trainer: L.Trainer, model: str, engine: RolloutEngine | None, max_length: int | None, num_minibatches: int
) -> None:
    """Refuse what cannot work together.

    Args:
        trainer: of the run.
        model: hub name or local folder of the policy.
        engine: what generates; `None` for a `TransformersEngine`.
        max_length: longest prompt plus response of the run, in tokens, where that is bounded.
        num_minibatches: updates per pass over the rollouts of a step.

    Raises:
        ValueError: the model cannot be had, or is not whole.
        MisconfigurationException: module, trainer and data do not fit.
    """
    positions = getattr(check_model_exists(model).get_text_config(), "max_position_embeddings", None)
    check_weights(model)
    if isinstance(trainer.strategy, ModelParallelStrategy) and not (engine and engine.takes_sharded_weights):
        name = "TransformersEngine" if engine is None else type(engine).__name__
        raise MisconfigurationException(
            f"{name} cannot generate with sharded weights; add SpeculativeRollout(engine=VLLMEngine()), or use "
            "strategy='ddp'"
        )
    if max_length is not None and positions is not None and max_length > positions:
        raise MisconfigurationException(
            f"prompts and responses of up to {max_length} tokens do not fit the {positions} positions of {model}; "
            "lower max_prompt_length or max_completion_length"
        )
    if complaint := unusable(trainer.precision):
        raise MisconfigurationException(complaint)
    batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if batch_size is not None and batch_size // trainer.world_size % num_minibatches:
        raise MisconfigurationException(
            f"{batch_size // trainer.world_size} prompts a step and rank (batch_size={batch_size}) cannot be divided "
            f"into num_minibatches={num_minibatches}; make batch_size a multiple of it"
        )


def max_length_of_run(data: Any, *samplings: SamplingConfig) -> int | None:
    """Longest prompt plus response, in tokens; `None` where the data does not bound its prompts.

    Args:
        data: the data module, or `None`.
        samplings: of the module; those of the data count as well.
    """
    prompt_length = getattr(data, "max_prompt_length", None)
    if prompt_length is None:
        return None
    everything = [*samplings, *getattr(data, "sampling", {}).values()]
    return prompt_length + max(sampling.max_completion_length for sampling in everything if sampling)


def max_rows_of_run(data: Any, num_ranks: int, training: SamplingConfig, evaluation: SamplingConfig) -> int | None:
    """Rows of a rank's largest request; `None` where the data does not say.

    Args:
        data: the data module, or `None`.
        num_ranks: that share the prompts of a step.
        training: of the module.
        evaluation: of the module.
    """
    batch_size = getattr(data, "batch_size", None)
    if batch_size is None:
        return None
    eval_batch_size = getattr(data, "eval_batch_size", batch_size)
    of_evaluation = [evaluation, *(sampling for sampling in getattr(data, "sampling", {}).values() if sampling)]
    rows = [batch_size * training.num_generations]
    rows += [eval_batch_size * sampling.num_generations for sampling in of_evaluation]
    return -(-max(rows) // num_ranks)


def write_atomic_checkpoints(strategy: Strategy) -> None:
    """Let checkpoints be whole or absent, where the run says nothing else of how they are written."""
    writer = strategy.checkpoint_io
    if type(writer) is TorchCheckpointIO:  # the default
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif isinstance(writer, AsyncCheckpointIO) and type(writer.checkpoint_io) is TorchCheckpointIO:
        writer._checkpoint_io = AtomicCheckpointIO()  # its setter takes the first one alone


def count_resumed_epoch(trainer: L.Trainer) -> None:
    """Count the epoch that begins when a run is resumed behind the last step of one.

    Lightning 2.6 does not, and the next resume would lose or repeat an epoch.
    """
    epochs: Any = trainer.fit_loop.epoch_progress
    if trainer.fit_loop.restarted_mid_epoch and epochs.total.ready == epochs.total.processed:
        epochs.increment_ready()
        epochs.increment_started()


def check_weights_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], model: str, their_model: str) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than those of the run.

    Args:
        own: state of the module.
        weights: of the checkpoint, maybe none.
        model: of the run.
        their_model: of the checkpoint's run.
    """
    if not weights:
        return
    ours = {name: tuple(weight.shape) for name, weight in own.items()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        raise MisconfigurationException(
            f"the checkpoint is of a run with model {their_model!r}, and does not fit this one with model {model!r}: "
            f"{len(differing)} weights differ, as {name}, {theirs.get(name, 'missing')} in the checkpoint and "
            f"{ours.get(name, 'missing')} here; take the model, critic and lora of the checkpoint's run, or leave "
            "ckpt_path out"
        )


def check_lora(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> None:
    """Refuse adapters that would act otherwise than those of the checkpoint, whose shapes they have.

    Args:
        ours: arguments of peft's `LoraConfig`, of the run.
        theirs: of the checkpoint's run; `None` where it had no adapters, or does not say.
    """
    if ours is None or theirs is None:
        return
    own, other = lora_config(ours), lora_config(theirs)
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(own, name) != getattr(other, name):
            raise MisconfigurationException(
                f"the checkpoint's adapters were trained with {name}={getattr(other, name)}, and this run has "
                f"{getattr(own, name)}, with which they would be another policy; take that of the checkpoint, or "
                "`lit-specrl export` it and begin from there"
            )


def check_sharding(was_sharded: bool, is_sharded: bool) -> None:
    """Refuse a module whose weights were built for another strategy."""
    if was_sharded != is_sharded:
        raise MisconfigurationException(
            f"the module has {'sharded' if was_sharded else 'whole'} weights of an earlier run or of "
            f"load_from_checkpoint, and this strategy needs {'sharded' if is_sharded else 'whole'} ones; make a new "
            "module, and give the weights by ckpt_path or as a folder for `model`"
        )
