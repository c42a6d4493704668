"""Reinforcement learning with verifiable rewards as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_specrl.advantages import ScaleRewards
from lit_specrl.algorithms.advantage_estimators import AdvantageEstimator, resolve_estimator, token_advantages
from lit_specrl.algorithms.closing import closing_callbacks
from lit_specrl.algorithms.dynamic_sampling import DynamicSampling, PromptStream, groups_with_spread
from lit_specrl.algorithms.entropy_bonus import EntropyCoefficient, EntropyTarget
from lit_specrl.algorithms.entropy_mask import TopEntropy
from lit_specrl.algorithms.evaluator import Evaluator, prediction_records
from lit_specrl.algorithms.gradient_step import GradientStep
from lit_specrl.algorithms.hyperparameters import hyperparameters
from lit_specrl.algorithms.kl_reward import kl_in_reward
from lit_specrl.algorithms.micro_batch_size import DEFAULT_MICRO_BATCH_TOKENS
from lit_specrl.algorithms.moving_reference import MovingReference
from lit_specrl.algorithms.objective import Objective
from lit_specrl.algorithms.optimizer_settings import OptimizerSettings
from lit_specrl.algorithms.optimizers import make_optimizers, optimizers_of, step_lr_schedulers
from lit_specrl.algorithms.pass_rates import record_pass_rates
from lit_specrl.algorithms.run_checks import (
    check_environment,
    check_lora,
    check_run,
    check_sharding,
    check_training_sampling,
    check_weights_fit,
    count_resumed_epoch,
    max_length_of_run,
    write_atomic_checkpoints,
)
from lit_specrl.algorithms.step_log import StepLog
from lit_specrl.algorithms.step_report import StepReport
from lit_specrl.algorithms.updater import Updater
from lit_specrl.allocator import keep_freed_memory
from lit_specrl.data.template import PromptTemplate
from lit_specrl.distributed.fsdp2 import sharding
from lit_specrl.distributed.signals import DeferredSignals
from lit_specrl.engines.base import RolloutEngine
from lit_specrl.engines.rollout_worker import RolloutWorker
from lit_specrl.environments import Environment
from lit_specrl.experience import Experience, padded_experience
from lit_specrl.losses import ImportanceSampling, KLCoefficient, KLPenalty, TokenLoss, named_loss
from lit_specrl.metrics import RolloutStatistics
from lit_specrl.models.critic import Critic, build_models
from lit_specrl.models.model_name import ModelName, hub_options
from lit_specrl.models.policy import Policy
from lit_specrl.models.scorer import Scorer
from lit_specrl.precision import warn_if_slow
from lit_specrl.rewards import Reward, RewardSet
from lit_specrl.timing import StageTimer
from lit_specrl.types import PromptBatch, Rollouts, SamplingConfig, check_at_least_one

DTYPES = ("float32", "bfloat16", "float16")


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-6 without weight decay, in one fused pass over the parameters."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class RLVRModule(L.LightningModule):
    """Reinforcement learning with verifiable rewards: generate, score, estimate advantages, update.

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward: `Reward`s, functions with TRL's signature, or import paths of such functions. The first
            one decides what counts as correct in validation.
        num_generations: rollouts per prompt, G.
        max_completion_length: longest response in training, in tokens.
        temperature: softmax temperature of training rollouts and of the log-probs of the loss.
        top_p: nucleus mass of training rollouts. Below 1, `importance_sampling` must be off: the engine's log-probs
            then belong to another distribution than the policy's.
        top_k: most likely tokens to sample from in training rollouts; the same holds.
        min_p: least probability of a token of training rollouts, as a share of that of the most likely one; the same.
        repetition_penalty: of training rollouts, as in `SamplingConfig`; the same holds.
        stop: texts that end a response in training. It ends with the token that completes one, which tokens and text
            keep, and counts as finished.
        stop_token_ids: further token ids that end a response in training.
        eval_sampling: how to sample in validation, test and predict where the data module does not say; by default one
            response per prompt under the training settings. Where it is given it takes nothing from them, nor `stop`.
        loss_type: "grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo", "luspo", "sapo", "vespo", "gpg", "geo_mean",
            "dppo_tv" or "dppo_kl" (`lit_specrl.losses`), or a loss by `class_path`, which has its own numbers. Ratios
            by sequence ("gspo", "luspo") stay close to 1 and need an `epsilon` of about 3e-4.
        epsilon: how far the probability ratio may fall below 1 before it is clipped.
        epsilon_high: how far it may rise above 1; `None` means `epsilon`.
        delta: largest ratio that enters the loss of a token with negative advantage; `None` for no bound.
        clip_ratio_c: largest multiple of its advantage that a token with negative advantage may cost (dual clip, c);
            `None` for no bound.
        advantage_estimator: "grpo" compares with the mean of the group, "rloo" with the mean of the others in it, "gae"
            with a critic; "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "grpo_passk", "gpg" and "gdpo"
            are in `lit_specrl.algorithms.advantage_estimators`; or one by `class_path`, such as `GAE` with its numbers.
        scale_rewards: "grpo", "grpo_passk" and "rloo" divide advantages by the standard deviation of the "group", of
            the "batch", or not ("none"). "rloo" knows no "group".
        beta: weight of the KL penalty towards the initial policy; 0 loads no reference model.
        kl: how the penalty is taken.
        entropy_coef: weight of a bonus for the entropy of the policy at each token, in the loss (verl's
            `entropy_coeff`); averaged as the loss is. An `EntropyTarget` adapts it.
        top_entropy_quantile: share of the tokens, those of the highest entropy, that the surrogate learns from. Below 1
            it costs a forward pass.
        off_policy_mask_threshold: rows of negative advantage from whose sampling the policy has moved further, in nats
            per token, are left out of the surrogate; `None` leaves out none.
        importance_sampling: correction of the difference between the engine's and the policy's log-probs; `None` for
            none.
        skip_special_tokens: leave special tokens out of the texts that rewards see; False for rewards that look for
            them, such as a tag of tool calls.
        mask_truncated_completions: leave responses that were cut at the length limit out of the loss.
        dynamic_sampling: replace groups without reward spread by fresh prompts; `True` for up to ten rounds.
        critic: the value model of "gae": `SeparateCritic` or `SharedTrunkCritic`.
        num_iterations: passes over the rollouts of a step.
        num_minibatches: updates per pass; the groups of a step are dealt out in order.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass. Changes memory and speed,
            not the result. `None` chooses on a GPU what fits the memory that is free once the engine has started
            (`choose_micro_batch_tokens`), and is 8192 on a CPU.
        max_grad_norm: gradients are scaled down to this norm.
        max_skipped_updates: successive updates with a non-finite gradient after which the run stops.
        optimizer: makes the optimizer from the policy's parameters.
        lr_scheduler: makes the learning rate schedule; stepped once per step. `None` keeps the rate constant.
        revision: branch, tag or commit of the policy on the hub; `None` for the main branch.
        trust_remote_code: run the modelling code that the policy's repository or folder brings along.
        lora: train low-rank adapters alone: arguments of peft's `LoraConfig`, such as
            `{r: 16, target_modules: all-linear}`. The reference is then the policy without its adapters.
        dtype: dtype of the policy's weights.
        attn_implementation: attention of the policy, as in transformers; `None` lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass; prompts are then not shared.
        compile_layers: compile the decoder layers (`torch.compile`) for passes over given tokens; prompts are then not
            shared either.
        seed: seed of the rollouts.
        environment: what answers the policy between its turns; `None` for responses of one turn.
        max_turns: most turns of a response, with an environment.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, for a trainer or data that cannot work together with these settings.
    """

    def __init__(
        self,
        model: str,
        rewards: Sequence[Reward | Callable[..., Any] | str],
        num_generations: int = 8,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: list[str] | str | None = None,
        stop_token_ids: list[int] | None = None,
        eval_sampling: SamplingConfig | None = None,
        loss_type: str | TokenLoss = "dapo",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        clip_ratio_c: float | None = None,
        advantage_estimator: str | AdvantageEstimator = "grpo",
        scale_rewards: ScaleRewards = "group",
        beta: float = 0.0,
        kl: KLPenalty = KLPenalty(),
        entropy_coef: float | EntropyTarget = 0.0,
        top_entropy_quantile: float = 1.0,
        off_policy_mask_threshold: float | None = None,
        importance_sampling: ImportanceSampling | None = ImportanceSampling(),
        skip_special_tokens: bool = True,
        mask_truncated_completions: bool = False,
        dynamic_sampling: bool | DynamicSampling = False,
        critic: Critic | None = None,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float = 1.0,
        max_skipped_updates: int = 3,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        lora: dict[str, Any] | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        seed: int = 0,
        environment: Environment | None = None,
        max_turns: int = 8,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.automatic_optimization = False
        self.sampling = SamplingConfig(
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            stop_token_ids=stop_token_ids,
        )
        self.eval_sampling = eval_sampling or replace(self.sampling, num_generations=1)
        check_training_sampling(self.sampling, importance_sampling)
        check_at_least_one(
            num_iterations=num_iterations,
            num_minibatches=num_minibatches,
            micro_batch_tokens=micro_batch_tokens,
            max_skipped_updates=max_skipped_updates,
            max_turns=max_turns,
        )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        self.model_name, self.lora = ModelName(model, revision, trust_remote_code), lora
        self.model_options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "gradient_checkpointing": gradient_checkpointing,
            "compile_layers": compile_layers,
        }
        self.micro_batch_tokens = micro_batch_tokens
        self.num_iterations, self.num_minibatches = num_iterations, num_minibatches
        self.mask_truncated_completions = mask_truncated_completions
        self.dynamic_sampling = DynamicSampling() if dynamic_sampling is True else dynamic_sampling or None
        self.critic = critic
        self.kl_in_reward = kl.in_reward and beta > 0
        self.advantage_estimator = resolve_estimator(
            advantage_estimator, scale_rewards, num_generations, critic is not None, self.kl_in_reward
        )
        if dynamic_sampling and num_generations < 2:
            raise ValueError(f"dynamic_sampling compares rows of a group, got num_generations={num_generations}")
        if isinstance(loss_type, str):
            loss_type = named_loss(loss_type, epsilon, epsilon_high, delta, clip_ratio_c)
        self.objective = Objective(
            loss_type, importance_sampling, kl, EntropyCoefficient(entropy_coef), off_policy_mask_threshold
        )
        self.top_entropy, self.reference = TopEntropy(top_entropy_quantile), MovingReference(kl, beta, lora)
        self.kl_coefficient = KLCoefficient(beta, kl.target, kl.horizon)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.step = 0
        """Training steps done."""
        self.policy_version = 0
        """Updates of the policy done."""
        self.policy: Policy | None = None
        self.timer = StageTimer(partial(self._hook, "on_stage_start"), partial(self._hook, "on_stage_progress"))
        self.report = StepReport(self.timer)
        self.worker = RolloutWorker(self.model_name, RewardSet(rewards), seed, self.timer, self._hook)
        self.worker.environment, self.worker.max_turns = environment, max_turns
        self.worker.skip_special_tokens = skip_special_tokens
        check_environment(environment, self.worker.rewards)
        names = ", ".join(f"{reward.weight:g} {reward.name}" for reward in self.worker.rewards.rewards)
        self.settings = hyperparameters({"algorithm": type(self).__name__} | arguments | {"rewards": names})
        """All settings as a flat table, for loggers."""
        self.evaluator = Evaluator(self.worker.rewards.rewards[0])
        self.evaluation: dict[str, float] = {}
        """Of the latest validation or test, as logged."""
        self._policy_step = GradientStep("actor", max_grad_norm, max_skipped_updates)
        self._critic_step = GradientStep("critic", critic.max_grad_norm if critic else 1.0, max_skipped_updates)
        self._signals, self._log = DeferredSignals(), StepLog()
        self._optimizer_settings = OptimizerSettings()

    # ------------------------------------------------------------------------------------------------------- algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.report.begin()
        rollouts = self.generate(batch, self.sampling, f"train/{self.step}")
        self.reward(rollouts)
        if self.dynamic_sampling:
            rollouts = self.fill_up(rollouts)
        self.size_micro_batches()
        with self.timer("experience"):
            experience = padded_experience(rollouts, self.mask_truncated_completions, self.rewards.weights)
            experience = experience.to(self.device)
        if self.dynamic_sampling:
            experience.keep_only(groups_with_spread(experience.rewards, self.sampling.num_generations))
        self.add_old_logprobs(experience)
        self.add_reference_logprobs(experience)
        self.add_advantages(experience)
        self._hook("on_experience_end", rollouts, experience)
        for minibatch in experience.minibatches(self.num_minibatches, passes=self.num_iterations):
            self.update_critic(minibatch)
            self.update_policy(minibatch)
        self.reference.follow(self.scorer, self.step)
        self.step_metrics |= step_lr_schedulers(self)
        self.step += 1
        self._log.write(self, self.report.finish(self.policy_version))

    def reward(self, rollouts: Rollouts) -> None:
        """Ask the rewards; the answers go into `rollouts`."""
        counters = self.worker.score(rollouts)
        self.report.generated.append(RolloutStatistics.of(rollouts, counters))
        record_pass_rates(self.trainer.train_dataloader, rollouts)

    def fill_up(self, rollouts: Rollouts) -> Rollouts:
        """DAPO's dynamic sampling: rounds of fresh prompts until every group has reward spread."""

        def generate(prompts: PromptBatch, index: int) -> Rollouts:
            found = self.generate(prompts, self.sampling, f"train/{self.step}/{index}")
            self.reward(found)
            return found

        assert self.dynamic_sampling is not None
        stream = cast(PromptStream, self.trainer.train_dataloader)
        rollouts, metrics = self.dynamic_sampling.fill_up(rollouts, generate, stream, self.device)
        self.step_metrics |= metrics
        return rollouts

    def size_micro_batches(self) -> None:
        """Choose `micro_batch_tokens` where it was left out, once."""
        if self.micro_batch_tokens is None:
            self.micro_batch_tokens = self.updater.size_micro_batches(optimizers_of(self), self.max_length)

    def add_old_logprobs(self, experience: Experience) -> None:
        """Log-probs under the policy that the step begins with, and the critic's values, where the updates need them.

        Where there is a single update, its own forward pass gives the old log-probs.
        """
        statistics = None
        with_values = self.critic is not None and self.critic.updates_with_policy
        every_row = with_values or self.top_entropy.is_on
        if self.num_iterations * self.num_minibatches > 1 or self.kl_in_reward or every_row:
            with self.timer("old_log_prob"):
                statistics = self.scorer.record_old_logprobs(experience, every_row)
                experience.entropy = statistics.entropy if self.top_entropy.is_on else None
        if self.critic is not None:
            with nullcontext() if with_values else self.timer("values"):
                experience.values = self.critic.values(statistics, self.scorer, experience)

    def add_reference_logprobs(self, experience: Experience) -> None:
        """Log-probs under the reference; none without a KL penalty."""
        if not self.kl_coefficient.value:
            experience.reference_logprobs = None
            return
        with self.timer("ref"):
            self.scorer.record_reference_logprobs(experience, every_row=self.reference.is_on)

    def add_advantages(self, experience: Experience) -> None:
        """Advantages, and with a critic returns."""
        if self.kl_in_reward:
            experience.kl_penalty, metrics = kl_in_reward(
                experience, self.kl_coefficient, self.objective.kl.estimator
            )  # [N, R]
            self.step_metrics |= metrics
        advantages = token_advantages(self.advantage_estimator, experience, self.sampling.num_generations)
        advantages, metrics = self.top_entropy(advantages, experience)
        self.step_metrics |= metrics
        experience.advantages = advantages  # [N, R]
        if experience.returns is not None:
            self.report.add_values(experience)

    def update_policy(self, experience: Experience) -> None:
        """One optimizer step of the policy on the given rows, and of a critic that shares its passes."""
        optimizer, critic_optimizer = optimizers_of(self)
        self.policy_version += self.updater.update_policy(
            experience, optimizer, critic_optimizer, kl_coef=self._kl_in_loss, step=self.step
        )

    def update_critic(self, experience: Experience) -> None:
        """One optimizer step of a critic with passes of its own."""
        self.updater.update_critic(experience, optimizers_of(self)[1], self.step)

    def trained_rows(self, experience: Experience) -> list[int]:
        """Rows that the next update computes; of the others the gradient is zero."""
        return self.updater.trained_rows(experience, self._kl_in_loss, self.step)

    @property
    def _kl_in_loss(self) -> float:
        return 0.0 if self.kl_in_reward else self.kl_coefficient.value

    def _backward(self, loss: Tensor) -> None:
        """Add to the gradients of this rank; sharded ones are averaged over the ranks as they come."""
        block_backward_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with block_backward_sync():
            self.manual_backward(loss)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self.evaluator.begin()

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"validation/{self.step}")

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"test/{self.step}")

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Responses to the prompts of a batch, as one record per row."""
        rollouts = self.generate(batch, batch.sampling or self.eval_sampling, purpose=f"predict/{self.step}")
        return prediction_records(batch, rollouts)

    def _evaluate(self, batch: PromptBatch, purpose: str) -> None:
        rollouts = self.generate(batch, batch.sampling or self.eval_sampling, purpose)
        self.worker.score(rollouts)
        self.evaluator.update(rollouts)
        self.timer.pop()  # evaluation is not part of the next step

    def on_validation_epoch_end(self) -> None:
        self.evaluation = self.evaluator.compute(self.device)
        if not self.trainer.sanity_checking:
            self.log_dict(self.evaluation, sync_dist=True)  # equal on all ranks already
        elif self.logger is not None and self.trainer.num_sanity_val_batches == self.trainer.num_val_batches:
            # a whole validation before training (num_sanity_val_steps=-1), which Lightning itself would throw away
            self.logger.log_metrics(self.evaluation, step=0)

    on_test_epoch_end = on_validation_epoch_end

    # ---------------------------------------------------------------------------------------------------------- set-up

    def configure_callbacks(self) -> list[L.Callback]:
        return closing_callbacks(self.trainer)

    def setup(self, stage: str) -> None:
        write_atomic_checkpoints(self.trainer.strategy)
        self._optimizer_settings.clear()
        self.check_run(stage)
        self.worker.max_length = self.max_length
        self.worker.template = getattr(self._datamodule, "template", None) or PromptTemplate()
        is_bfloat16 = str(self.trainer.precision).startswith("bf16") or self.model_options["dtype"] == "bfloat16"
        warn_if_slow(
            f"precision={self.trainer.precision!r} with dtype={self.model_options['dtype']!r}",
            "bfloat16" if is_bfloat16 else "float32",
            self.trainer.strategy.root_device,
        )

    def check_run(self, stage: str) -> None:
        """Whether module, trainer and data fit each other, before anything is loaded.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: the model cannot be had, or is not whole.
            MisconfigurationException: they do not fit.
        """
        num_minibatches = self.num_minibatches if stage == "fit" else 1
        check_run(self.trainer, self.model_name, self.engine, self.max_length, num_minibatches)
        if self.critic is not None:
            self.critic.check_files()
        self.reference.check(stage == "fit" and self.is_sharded)

    def configure_model(self) -> None:
        if self.policy is not None:
            check_sharding(self.scorer.is_sharded, self.is_sharded)
            return
        if self._trainer is None or self.trainer.strategy.root_device.type == "cpu":  # None: `load_from_checkpoint`
            keep_freed_memory()
        self.policy, reference = build_models(
            self.model_name,
            self.model_options,
            lora=self.lora,
            critic=self.critic,
            with_reference=self.kl_coefficient.value > 0,
            sharding=sharding(self.trainer) if self.is_sharded else None,
        )
        self.worker.policy = self.policy
        self.scorer: Scorer = Scorer(
            self.policy,
            reference,
            temperature=self.sampling.temperature,
            micro_batch_tokens=self.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS,
            is_sharded=self.is_sharded,
        )
        self.updater = Updater(
            self.scorer,
            self.objective,
            self.critic,
            policy_step=self._policy_step,
            critic_step=self._critic_step,
            sampling=self.sampling,
            backward=self._backward,
            report=self.report,
            only_groups_with_spread=self.dynamic_sampling is not None,
        )

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        made = make_optimizers(self.policy, self.critic, self.make_optimizer, self.make_lr_scheduler)
        self._optimizer_settings.record(*made)
        return made

    def on_train_start(self) -> None:
        self._signals.install(self.trainer)
        count_resumed_epoch(self.trainer)
        if self.dynamic_sampling and not isinstance(self.trainer.train_dataloader, PromptStream):
            raise MisconfigurationException(
                "dynamic_sampling draws fresh prompts from the training data, which "
                f"{type(self.trainer.train_dataloader).__name__} cannot give; train with a PromptDataModule"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._signals.raise_pending(self.device)

    def teardown(self, stage: str) -> None:
        self.worker.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlvr"] = {
            "model": str(self.model_name),
            "hub_options": hub_options(self.model_name),
            "lora": self.lora,
            "step": self.step,
            "policy_version": self.policy_version,
            "skipped_updates": [self._policy_step.num_skipped, self._critic_step.num_skipped],
            "kl_coefficient": self.kl_coefficient.value,
            "entropy_coefficient": self.objective.entropy.state_dict(),
            "optimizer_settings": self._optimizer_settings.state_dict(),
            **self.reference.state_dict(self.scorer),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "rlvr" not in checkpoint:
            raise MisconfigurationException(
                f"the checkpoint is not of an RLVRModule such as {type(self).__name__}: it holds "
                f"{', '.join(sorted(checkpoint))}"
            )
        state = checkpoint["rlvr"]
        if not self.is_sharded:  # a sharded one has its weights elsewhere
            check_weights_fit(self.state_dict(), checkpoint.get("state_dict", {}), self.model_name, state["model"])
        check_lora(self.lora, state.get("lora"))
        self.step, self.policy_version = state["step"], state["policy_version"]
        self._policy_step.num_skipped, self._critic_step.num_skipped = state["skipped_updates"]
        if self.kl_coefficient.target is not None and state["kl_coefficient"]:  # 0: trained without a penalty
            self.kl_coefficient.value = state["kl_coefficient"]
        self.objective.entropy.load_state_dict(state.get("entropy_coefficient", self.objective.entropy.state_dict()))
        self.reference.load_state_dict(self.scorer, state)
        self._optimizer_settings.load_state_dict(state.get("optimizer_settings", {}))

    # ------------------------------------------------------------------------------------------- what callbacks may use

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str) -> Rollouts:
        """Sample responses under the current policy; arguments as those of `RolloutWorker.generate`."""
        return self.worker.generate(prompts, sampling, purpose, self.policy_version)

    def current_engine(self) -> RolloutEngine:
        """The engine, started and holding the weights of the current policy."""
        return self.worker.current_engine(self.policy_version)

    @property
    def engine(self) -> RolloutEngine | None:
        """What generates; `None` stands for a `TransformersEngine` that is made with the first rollout."""
        return self.worker.engine

    @engine.setter
    def engine(self, engine: RolloutEngine | None) -> None:
        self.worker.engine = engine

    @property
    def rewards(self) -> RewardSet:
        """What is rewarded."""
        return self.worker.rewards

    @property
    def environment(self) -> Environment | None:
        """What answers between turns."""
        return self.worker.environment

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the policy."""
        return self.worker.tokenizer

    @property
    def step_metrics(self) -> dict[str, float]:
        """Of the present training step, or behind it of the latest, as logged; callbacks add theirs."""
        return self.report.metrics

    @step_metrics.setter
    def step_metrics(self, metrics: dict[str, float]) -> None:
        self.report.metrics = metrics

    @property
    def max_length(self) -> int | None:
        """Longest prompt plus response of the run, in tokens; `None` where the data does not bound its prompts."""
        return max_length_of_run(self._datamodule, self.sampling, self.eval_sampling)

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks meet in every layer of every pass."""
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def device(self) -> torch.device:
        """Where the policy computes, also where its weights wait on the host."""
        with suppress(RuntimeError):  # without a trainer
            if getattr(self.trainer.strategy, "cpu_offload", False):
                return self.trainer.strategy.root_device
        return super().device

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _hook(self, name: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, name, None)  # as Lightning calls its own
            if hook is not None:
                hook(self.trainer, self, *arguments)
