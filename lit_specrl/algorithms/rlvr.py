"""The algorithm as a LightningModule: rollouts, advantages, updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_specrl.advantages import (
    AdvantageEstimator,
    ScaleRewards,
    check_estimator,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_at_last_token,
)
from lit_specrl.algorithms.constant_rewards import ConstantRewards
from lit_specrl.algorithms.dynamic_sampling import GroupSelection, groups_to_draw, groups_with_spread
from lit_specrl.algorithms.gradient_step import GradientStep
from lit_specrl.algorithms.objective import Objective
from lit_specrl.allocator import keep_freed_memory
from lit_specrl.distributed.collectives import (
    average_gradients,
    gather_objects,
    gather_rows,
    max_over_ranks,
    num_ranks,
    sum_over_ranks,
)
from lit_specrl.distributed.fsdp2 import sharding
from lit_specrl.distributed.signals import DeferredSignals
from lit_specrl.experience import padded_experience, rows_with_gradient
from lit_specrl.losses import (
    Aggregation,
    ImportanceSampling,
    KLCoefficient,
    KLEstimator,
    PolicyLoss,
    kl_penalty,
    resolve_loss_type,
    token_weights,
)
from lit_specrl.masking import masked_mean, masked_whiten
from lit_specrl.metrics import CriticStatistics, RolloutStatistics, UpdateStatistics, ValueStatistics, merge
from lit_specrl.models.capture import Student
from lit_specrl.models.critic import Critic, SeparateCritic, SharedTrunkCritic
from lit_specrl.models.micro_batches import MicroBatch
from lit_specrl.models.model_files import check_weights
from lit_specrl.models.policy import Policy, TokenStatistics, check_model_exists
from lit_specrl.models.scorer import ScoringModule
from lit_specrl.precision import warn_if_slow
from lit_specrl.rewards import Reward
from lit_specrl.types import Experience, PromptBatch, Rollouts, SamplingConfig

DTYPES = ("float32", "bfloat16", "float16")


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-6 without weight decay, in one fused pass over the parameters."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class RLVRModule(ScoringModule):
    """Reinforcement learning with verifiable rewards: generate, score, estimate advantages, update.

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward: `Reward`s, functions with TRL's signature, or import paths of such functions. The first one
            decides what counts as correct in validation.
        num_generations: rollouts per prompt, G.
        max_completion_length: longest response in training, in tokens.
        temperature: softmax temperature of training rollouts; the log-probs of the loss are taken at the same temperature.
        top_p: nucleus mass of training rollouts. Below 1, `importance_sampling` must be off: the engine's log-probs then
            belong to another distribution than the policy's.
        top_k: most likely tokens to sample from in training rollouts; the same holds.
        eval_sampling: how to sample in validation, test and predict where the data module does not say; by default one
            response per prompt under the training settings.
        loss_type: "grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo" or "luspo": surrogate and normalisation
            (`lit_specrl.losses.LOSS_TYPES`). Ratios by sequence ("gspo", "luspo") stay close to 1 and want an `epsilon` of about 3e-4.
        epsilon: how far the probability ratio may fall below 1 before it is clipped.
        epsilon_high: how far it may rise above 1; `None` means `epsilon`.
        delta: largest ratio that enters the loss of a token with negative advantage; `None` for no bound.
        clip_ratio_c: largest multiple of its advantage that a token with negative advantage may cost (dual clip, c); `None` for
            no bound.
        advantage_estimator: "grpo" compares with the mean of the group, "rloo" with the mean of the others in it, "gae" with a critic.
        scale_rewards: divide advantages by the standard deviation of the "group", of the "batch", or not ("none"). "rloo" knows no "group";
            "gae" does not scale by groups and leaves this unused.
        beta: weight of the KL penalty towards the initial policy; 0 loads no reference model.
        kl_estimator: "k1", "k2", "k3" (Schulman 2020) or another name of `lit_specrl.losses.kl_penalty`.
        kl_in_reward: subtract the penalty from the rewards, token by token, instead of adding it to the loss.
        kl_target: KL, in nats per token, that `beta` is adapted to hold; `None` keeps it. Needs `kl_in_reward`.
        kl_horizon: rows over which `beta` adapts.
        importance_sampling: correction of the difference between the engine's and the policy's log-probs; `None` for none.
        mask_truncated_completions: leave responses that were cut at the length limit out of the loss.
        dynamic_sampling: replace groups without reward spread by fresh prompts; those left after the last round are left out
            of the loss.
        max_generation_rounds: rounds of generation per step under dynamic sampling.
        critic: the value model of "gae": `SeparateCritic` or `SharedTrunkCritic`.
        gamma: discount per token of "gae".
        gae_lambda: of "gae"; 0 trusts the critic, 1 trusts the rewards.
        whiten_advantages: bring the advantages of "gae" to mean 0 and variance 1 over the tokens of the step.
        num_iterations: passes over the rollouts of a step.
        num_minibatches: updates per pass; the groups of a step are dealt out in order.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass. Changes memory and speed,
            not the result.
        max_grad_norm: gradients are scaled down to this norm.
        max_skipped_updates: successive updates with a non-finite gradient after which the run stops.
        optimizer: makes the optimizer from the policy's parameters.
        lr_scheduler: makes the learning rate schedule from the optimizer; stepped once per step. `None` keeps the rate constant.
        lora: train low-rank adapters alone: arguments of peft's `LoraConfig`, such as `{r: 16, target_modules: all-linear}`. The
            reference of the KL penalty is then the policy without its adapters.
        dtype: dtype of the policy's weights.
        attn_implementation: attention of the policy, as in transformers; `None` lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass; prompts are then not shared.
        seed: seed of the rollouts.

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
        eval_sampling: SamplingConfig | None = None,
        loss_type: str = "dapo",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        clip_ratio_c: float | None = None,
        advantage_estimator: AdvantageEstimator = "grpo",
        scale_rewards: ScaleRewards = "group",
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in_reward: bool = False,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        importance_sampling: ImportanceSampling | None = ImportanceSampling(),
        mask_truncated_completions: bool = False,
        dynamic_sampling: bool = False,
        max_generation_rounds: int = 10,
        critic: Critic | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        whiten_advantages: bool = True,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        micro_batch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
        max_skipped_updates: int = 3,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: dict[str, Any] | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        sampling = SamplingConfig(num_generations, max_completion_length, temperature, top_p, top_k)
        super().__init__(
            model=model,
            rewards=rewards,
            sampling=sampling,
            eval_sampling=eval_sampling or SamplingConfig(1, max_completion_length, temperature, top_p, top_k),
            micro_batch_tokens=micro_batch_tokens,
            lora=lora,
            seed=seed,
        )
        self.automatic_optimization = False
        if temperature == 0:
            raise ValueError(
                "temperature must be positive in training, got 0; greedy rollouts of a group are all the same"
            )
        if importance_sampling is not None and sampling.is_truncated:
            raise ValueError(
                f"importance_sampling is biased under top_p={top_p} and top_k={top_k}: the engine's log-probs belong to the "
                "truncated distribution; use top_p=1.0 without top_k, or importance_sampling=None"
            )
        for name, value in {
            "num_iterations": num_iterations,
            "num_minibatches": num_minibatches,
            "micro_batch_tokens": micro_batch_tokens,
            "max_skipped_updates": max_skipped_updates,
            "max_generation_rounds": max_generation_rounds,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if kl_target is not None and not kl_in_reward:
            raise ValueError(f"kl_target={kl_target} adapts a penalty in the reward; set kl_in_reward=True")
        check_estimator(advantage_estimator, num_generations, scale_rewards, critic is not None, gamma, gae_lambda)
        if dynamic_sampling and num_generations < 2:
            raise ValueError(f"dynamic_sampling compares rows of a group, got num_generations={num_generations}")

        loss = resolve_loss_type(loss_type)
        self.objective = Objective(
            PolicyLoss(
                epsilon,
                epsilon_high,
                delta,
                clip_ratio_c,
                importance_sampling_level=loss.importance_sampling_level,
                surrogate=loss.surrogate,
            ),
            importance_sampling,
            kl_estimator,
        )
        self.aggregation = loss.aggregation
        self.advantage_estimator: AdvantageEstimator = advantage_estimator
        self.scale_rewards: ScaleRewards = scale_rewards
        self.kl_coefficient = KLCoefficient(beta, kl_target, kl_horizon)
        self.kl_in_reward = kl_in_reward and beta > 0
        self.mask_truncated_completions = mask_truncated_completions
        self.dynamic_sampling = dynamic_sampling
        self.max_generation_rounds = max_generation_rounds
        self.critic = critic
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.whiten_advantages = whiten_advantages
        self.num_iterations = num_iterations
        self.num_minibatches = num_minibatches
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.model_options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.settings = {
            "algorithm": type(self).__name__,
            "model": model,
            "rewards": ", ".join(f"{reward.weight:g} {reward.name}" for reward in self.rewards.rewards),
            **vars(sampling),
            "loss_type": loss_type,
            "epsilon": epsilon,
            "epsilon_high": epsilon if epsilon_high is None else epsilon_high,
            "advantage_estimator": advantage_estimator,
            "scale_rewards": scale_rewards,
            "beta": beta,
            "kl_in_reward": kl_in_reward,
            "dynamic_sampling": dynamic_sampling,
            "num_iterations": num_iterations,
            "num_minibatches": num_minibatches,
            "max_grad_norm": max_grad_norm,
            "dtype": dtype,
            "seed": seed,
        }  # for the logger's table of runs

        self._policy_step = GradientStep("actor", max_grad_norm, max_skipped_updates)
        self._critic_step = GradientStep("critic", critic.max_grad_norm if critic else 1.0, max_skipped_updates)
        self._signals = DeferredSignals()
        self._generated: list[RolloutStatistics] = []  # all rounds of the current step
        self._constant_rewards = ConstantRewards()
        self._critic_updates: list[CriticStatistics] = []
        self.step_metrics: dict[str, float] = {}  # of the latest training step, as logged
        self.student: Student | None = None  # learns from the forward passes of the updates

    # ---------------------------------------------------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        super().setup(stage)
        is_bfloat16 = str(self.trainer.precision).startswith("bf16") or self.model_options["dtype"] == "bfloat16"
        warn_if_slow(
            f"precision={self.trainer.precision!r} with dtype={self.model_options['dtype']!r}",
            "bfloat16" if is_bfloat16 else "float32",
            self.trainer.strategy.root_device,
        )

    def check_run(self, stage: str) -> None:
        super().check_run(stage)
        if isinstance(self.critic, SeparateCritic) and self.critic.model is not None:
            check_model_exists(self.critic.model)
            check_weights(self.critic.model)
        if self.trainer.precision == "16-mixed":
            raise MisconfigurationException(
                "precision='16-mixed' scales the loss, which manual gradient clipping does not know of; use 'bf16-mixed' or '32-true'"
            )
        batch_size = getattr(self._datamodule, "batch_size", None)
        if stage == "fit" and batch_size is not None and batch_size // self.trainer.world_size % self.num_minibatches:
            raise MisconfigurationException(
                f"{batch_size // self.trainer.world_size} prompts a step and rank (batch_size={batch_size}) cannot be divided "
                f"into num_minibatches={self.num_minibatches}; make batch_size a multiple of it"
            )

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self.policy = Policy.build(self.model_name, lora=self.lora, **self.model_options)
        if self.critic is not None:
            self.critic.build(self.policy, self.model_name, **self.model_options)
        if self.kl_coefficient.value and self.lora is None:
            reference = Policy.build(self.model_name, **{**self.model_options, "gradient_checkpointing": False})
            self._frozen = [reference.requires_grad_(False).eval()]
        if self.is_sharded:
            models: list[Policy | Critic] = [self.policy, *self._frozen, *([self.critic] if self.critic else [])]
            for shardable in models:
                shardable.shard(**sharding(self.trainer))

    def configure_optimizers(self) -> Any:
        owned = [(self._policy_parameters, self.make_optimizer, self.make_lr_scheduler)]
        if self.critic is not None:
            owned.append((self._critic_parameters, self.critic.make_optimizer, self.critic.make_lr_scheduler))
        optimizers = [make_optimizer(parameters) for parameters, make_optimizer, _ in owned]
        schedulers = [make(optimizer) for optimizer, (_, _, make) in zip(optimizers, owned, strict=True) if make]
        return optimizers, schedulers

    @property
    def _policy_parameters(self) -> list[torch.nn.Parameter]:
        assert self.policy is not None
        return [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]

    @property
    def _critic_parameters(self) -> list[torch.nn.Parameter]:
        assert self.policy is not None and self.critic is not None
        return list(self.critic.trained_parameters(self.policy))

    def on_train_start(self) -> None:
        self._signals.install(self.trainer)
        epochs: Any = self.trainer.fit_loop.epoch_progress
        if self.trainer.fit_loop.restarted_mid_epoch and epochs.total.ready == epochs.total.processed:
            # Lightning 2.6 does not count the epoch that begins when a run is resumed behind the last step of one; the next resume would lose or repeat an epoch
            epochs.increment_ready()
            epochs.increment_started()
        if self.dynamic_sampling and not hasattr(self.trainer.train_dataloader, "draw"):
            raise MisconfigurationException(
                "dynamic_sampling draws fresh prompts from the training data, which "
                f"{type(self.trainer.train_dataloader).__name__} cannot give; train with a PromptDataModule"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._signals.raise_pending(self.device)

    # ------------------------------------------------------------------------------------------------------- algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        started_at = time.perf_counter()
        self.step_metrics, self._generated, self._critic_updates = {}, [], []
        rollouts = self.collect(batch)
        experience = self.make_experience(rollouts)
        self._hook("on_experience_end", rollouts, experience)
        updates = UpdateStatistics()
        for _ in range(self.num_iterations):
            for minibatch in experience.minibatches(self.num_minibatches):
                self.update_critic(minibatch)
                updates += self.update_policy(minibatch)
        self._step_lr_schedulers()
        self.step += 1
        self._log_step(updates, started_at)

    def collect(self, batch: PromptBatch) -> Rollouts:
        """Generate and score the rollouts of a step; under dynamic sampling, in rounds, until every group has reward spread."""
        rollouts = self._generate_and_score(batch, f"train/{self.step}")
        if not self.dynamic_sampling:
            return rollouts
        selection, loader = GroupSelection(num_groups=len(batch)), cast(Any, self.trainer.train_dataloader)
        selection.add(rollouts)
        while selection.num_rounds < self.max_generation_rounds:
            missing = max_over_ranks(selection.num_missing, self.device)
            if not missing:
                break
            found = gather_objects((selection.num_useful, selection.num_generated))
            useful, generated = (sum(counts) for counts in zip(*found, strict=True))
            # every rank draws as many, also one that has enough: the ranks move through the data together
            prompts = loader.draw(groups_to_draw(missing, useful, generated, len(batch)))
            selection.add(self._generate_and_score(prompts, f"train/{self.step}/{selection.num_rounds}"))
        counts = gather_objects(selection.metrics())
        self.step_metrics |= {name: sum(rank[name] for rank in counts) for name in counts[0]}
        self.step_metrics["dynamic_sampling/rounds"] /= num_ranks()
        return selection.result()

    def _generate_and_score(self, prompts: PromptBatch, purpose: str) -> Rollouts:
        rollouts = self.generate(prompts, self.sampling, purpose)
        counters = self.score(rollouts)
        self._generated.append(RolloutStatistics.of(rollouts, counters))
        return rollouts

    def make_experience(self, rollouts: Rollouts) -> Experience:
        """Everything the updates need to know beforehand: log-probs that the loss cannot do without, values, advantages."""
        experience = padded_experience(rollouts, self.mask_truncated_completions).to(self.device)
        if self.dynamic_sampling:
            spread = groups_with_spread(experience.rewards, self.sampling.num_generations)  # [B]
            experience.loss_mask = experience.loss_mask & spread[experience.prompt_index, None]
        unknown = self._take_known_logprobs(experience, rollouts)
        shares_trunk = self.critic is not None and self.critic.shares_trunk
        if self._several_updates or self.kl_in_reward or shares_trunk:
            with self.timer("old_log_prob"):
                rows = list(range(experience.num_rows)) if shares_trunk else unknown  # values are needed of all rows
                old = self.token_statistics(self.policy, experience, rows)
                experience.record_logprobs(old.logprobs[rows], rows)
                experience.old_logprobs, experience.values = experience.recorded_logprobs, old.values
        if self.kl_coefficient.value:
            with self.timer("ref"):
                experience.reference_logprobs = self.reference_logprobs(experience, rollouts)
        if isinstance(self.critic, SeparateCritic):
            with self.timer("values"):
                experience.values = self.token_values(self.critic, experience)
        self.estimate_advantages(experience)
        return experience

    def _take_known_logprobs(self, experience: Experience, rollouts: Rollouts) -> list[int]:
        """Enter the log-probs that are known already; returns the rows that remain."""
        empty = torch.full_like(experience.sampling_logprobs, torch.nan)  # [N, R]
        experience.recorded_logprobs = empty.masked_fill(~experience.response_mask, 0)
        unknown = []
        for row in range(rollouts.num_rows):
            known = rollouts.known_row(row)
            if known is None or known.policy_logprobs is None:
                unknown.append(row)
                continue
            logprobs = torch.as_tensor(known.policy_logprobs, dtype=torch.float32, device=self.device)
            experience.recorded_logprobs[row, : len(logprobs)] = logprobs
        return unknown

    def estimate_advantages(self, experience: Experience) -> None:
        """Fill in the advantages, and with a critic the returns."""
        rewards, mask = experience.rewards, experience.response_mask
        size = self.sampling.num_generations
        penalty = self._kl_in_reward(experience) if self.kl_in_reward else None  # [N, R]
        if self.critic is not None:
            assert experience.values is not None
            experience.loss_mask = experience.loss_mask & ~rewards.isnan()[:, None]
            token_rewards = rewards_at_last_token(rewards.nan_to_num(), mask)  # [N, R]
            if penalty is not None:
                token_rewards = token_rewards - penalty
            advantages, experience.returns = generalized_advantages(
                token_rewards, experience.values, mask, self.gamma, self.gae_lambda
            )
            if self.whiten_advantages:
                advantages = masked_whiten(advantages, experience.loss_mask, add_up=sum_over_ranks)
            experience.advantages = advantages
            values = ValueStatistics.of(experience.values, experience.returns, experience.loss_mask)
            self.step_metrics |= merge(gather_objects(values)).metrics()
            return
        if penalty is not None:
            rewards = rewards - penalty.sum(-1)
        everyone, own = gather_rows(rewards)
        if self.advantage_estimator == "rloo":
            row_advantages = leave_one_out_advantages(everyone, size, normalize=self.scale_rewards == "batch")
        else:
            row_advantages = group_advantages(everyone, size, self.scale_rewards)
        experience.advantages = row_advantages[own, None] * mask  # [N, R]

    def _kl_in_reward(self, experience: Experience) -> Tensor:
        """What each token's departure from the initial policy costs in reward, [N, R]; adapts the price."""
        assert experience.old_logprobs is not None and experience.reference_logprobs is not None
        mask = experience.response_mask
        kl = kl_penalty(experience.old_logprobs, experience.reference_logprobs, mask, self.objective.kl_estimator)
        penalty = self.kl_coefficient.value * kl
        num_rows = sum_over_ranks(torch.tensor(experience.num_rows, device=self.device))
        mean_kl = sum_over_ranks(masked_mean(kl, mask, dim=-1).sum()) / num_rows
        self.step_metrics["actor/reward_kl_penalty"] = float(mean_kl)
        self.step_metrics["actor/reward_kl_penalty_coeff"] = self.kl_coefficient.value
        self.kl_coefficient.update(float(mean_kl), int(num_rows))
        return penalty

    # --------------------------------------------------------------------------------------------------------- updates

    def update_policy(self, experience: Experience) -> UpdateStatistics:
        """One optimizer step on the given rows; the gradient is the same however they are cut into micro-batches."""
        assert self.policy is not None
        shared = self.critic if isinstance(self.critic, SharedTrunkCritic) else None
        optimizer, critic_optimizer = self._optimizers()
        updated = []
        if not self._critic_warms_up:
            updated.append((self._policy_step, optimizer))
        if shared is not None:
            assert self.policy.value_head is not None
            self.policy.value_head.detach = self._critic_warms_up
            updated.append((self._critic_step, critic_optimizer))
        if not updated:
            return UpdateStatistics()
        with self.timer("update_actor"):
            for _, owner in updated:
                owner.zero_grad()
            weights = self._token_weights(experience, self.aggregation)
            value_weights = weights if shared is None else self._token_weights(experience, "token")
            rows = self.trained_rows(experience)
            update = UpdateStatistics(
                num_updates=1,
                trained_tokens=int((experience.prompt_lengths + experience.response_lengths)[rows].sum()),
                rows_without_gradient=experience.num_rows - len(rows),
            )
            for micro_batch in self._plan(experience, rows):
                part = experience.select(micro_batch.rows)
                cut = micro_batch.rows, slice(part.response_ids.shape[1])
                statistics = self._forward_and_teach(part, micro_batch)
                per_token_loss, found = self.objective(statistics, part, self._kl_in_loss)  # [n, R]
                loss = (per_token_loss * weights[cut]).sum()
                if experience.old_logprobs is None:
                    experience.record_logprobs(statistics.logprobs.detach(), micro_batch.rows)
                if self._critic_warms_up:
                    loss = torch.zeros_like(loss)
                if shared is not None:
                    assert statistics.values is not None
                    per_token_value_loss, critic_found = shared.loss(statistics.values, part)  # [n, R]
                    loss = loss + shared.coefficient * (per_token_value_loss * value_weights[cut]).sum()
                    if micro_batch.counts:
                        self._critic_updates.append(critic_found)
                self._backward(loss * micro_batch.counts)
                if micro_batch.counts:
                    update += replace(
                        found,
                        loss=loss.detach() / num_ranks(),
                        computed_tokens=micro_batch.num_tokens,
                        real_tokens=micro_batch.num_real_tokens,
                    )
            for gradient_step, owner in updated:
                applied = self._apply_gradient(gradient_step, owner)
                self.policy_version += applied and gradient_step is self._policy_step
        return update

    def _forward_and_teach(self, part: Experience, micro_batch: MicroBatch) -> TokenStatistics:
        assert self.policy is not None
        student = self.student if micro_batch.counts else None
        teaching = None if student is None else student.asks(part)
        statistics = self._forward(self.policy, part, micro_batch, teaching)
        if student is not None and statistics.taught:
            student.listens(part, statistics.taught)
        return statistics

    def update_critic(self, experience: Experience) -> None:
        """One optimizer step of a critic with weights of its own."""
        if not isinstance(self.critic, SeparateCritic):
            return
        with self.timer("update_critic"):
            _, optimizer = self._optimizers()
            optimizer.zero_grad()
            weights = self._token_weights(experience, "token")
            for micro_batch in self._plan(experience, rows_with_gradient(experience, every_row_matters=True)):
                part = experience.select(micro_batch.rows)
                values = self._values(self.critic, part, micro_batch)
                per_token_loss, found = self.critic.loss(values, part)  # [n, R]
                loss = (per_token_loss * weights[micro_batch.rows, : values.shape[1]]).sum()
                self._backward(loss * micro_batch.counts)
                if micro_batch.counts:
                    self._critic_updates.append(found)
            self._apply_gradient(self._critic_step, optimizer)

    @property
    def _several_updates(self) -> bool:
        """Otherwise the training forward gives the old log-probs."""
        return self.num_iterations * self.num_minibatches > 1

    def trained_rows(self, experience: Experience) -> list[int]:
        """Rows that the next update computes; of the others the gradient is zero."""
        if self._critic_warms_up and not isinstance(self.critic, SharedTrunkCritic):
            return []
        every_row_matters = self._kl_in_loss > 0 or isinstance(self.critic, SharedTrunkCritic)
        return rows_with_gradient(experience, every_row_matters)

    @property
    def _kl_in_loss(self) -> float:
        return 0.0 if self.kl_in_reward else self.kl_coefficient.value

    @property
    def _critic_warms_up(self) -> bool:
        return self.critic is not None and self.step < self.critic.warmup_steps

    def _optimizers(self) -> tuple[Any, Any]:
        """Of the policy and of the critic. Lightning counts the steps of the first alone (`trainer.global_step`)."""
        wrapped: Any = self.optimizers()
        if self.critic is None:
            return wrapped, None
        raw: Any = self.optimizers(use_pl_optimizer=False)
        return wrapped[0], raw[1]

    def _token_weights(self, experience: Experience, aggregation: Aggregation) -> Tensor:
        """What each token weighs in the loss of all ranks together, [N, R]."""
        num_rows = torch.tensor(experience.num_rows, device=self.device)
        if self.dynamic_sampling:  # groups that only fill the batch up are no part of it
            size = self.sampling.num_generations
            num_rows = groups_with_spread(experience.rewards, size).sum() * size
        return token_weights(
            experience.loss_mask,
            aggregation,
            num_tokens=sum_over_ranks(experience.loss_mask.sum()),
            num_sequences=sum_over_ranks(num_rows),
            max_completion_length=self.sampling.max_completion_length,
            num_ranks=num_ranks(),
        )

    def _backward(self, loss: Tensor) -> None:
        """Add to the gradients of this rank; sharded ones are averaged over the ranks as they come."""
        block_backward_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with block_backward_sync():
            self.manual_backward(loss)

    def _apply_gradient(self, gradient_step: GradientStep, optimizer: Any) -> bool:
        """Update from the gradients of all ranks; says whether it was done."""
        # not the model's: between passes some of those are whole ones, which get no gradient
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self.is_sharded:
            average_gradients(parameters)
        applied, metrics = gradient_step(optimizer, parameters, self.step)
        self.step_metrics |= metrics
        # where autocast caches its bf16 copies of the weights (Lightning's own plugin does not), they are of before the update
        torch.clear_autocast_cache()
        return applied

    def _step_lr_schedulers(self) -> None:
        names = ["actor", "critic"] if self.critic is not None else ["actor"]
        for name, optimizer in zip(names, self._optimizers(), strict=False):
            self.step_metrics[f"{name}/lr"] = float(optimizer.param_groups[0]["lr"])
        schedulers: Any = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()

    # ---------------------------------------------------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlvr"] = {
            "model": self.model_name,
            "lora": self.lora,
            "step": self.step,
            "policy_version": self.policy_version,
            "skipped_updates": [self._policy_step.num_skipped, self._critic_step.num_skipped],
            "kl_coefficient": self.kl_coefficient.value,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "rlvr" not in checkpoint:
            raise MisconfigurationException(
                f"the checkpoint is not of an RLVRModule such as {type(self).__name__}: it holds {', '.join(sorted(checkpoint))}"
            )
        state = checkpoint["rlvr"]
        self._check_weights(checkpoint.get("state_dict", {}), state["model"])
        self.step, self.policy_version = state["step"], state["policy_version"]
        self._policy_step.num_skipped, self._critic_step.num_skipped = state["skipped_updates"]
        if self.kl_coefficient.target is not None:
            self.kl_coefficient.value = state["kl_coefficient"]

    # --------------------------------------------------------------------------------------------------------- helpers

    def _check_weights(self, weights: dict[str, Tensor], model: str) -> None:
        """Refuse a checkpoint whose weights have other names or shapes than those of the run; one of a sharded run has them elsewhere."""
        if not weights or self.is_sharded:
            return
        own = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
        differing = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            raise MisconfigurationException(
                f"the checkpoint is of a run with model {model!r}, and does not fit this one with model {self.model_name!r}: {len(differing)} weights "
                f"differ, as {name}, {theirs.get(name, 'missing')} in the checkpoint and {own.get(name, 'missing')} here; take the model, critic and lora "
                "of the checkpoint's run, or leave ckpt_path out"
            )

    def _log_step(self, updates: UpdateStatistics, started_at: float) -> None:
        seconds = self.timer.pop()
        step_s = time.perf_counter() - started_at
        seconds["other"] = step_s - sum(seconds.values())
        ranks = gather_objects({**seconds, "step": step_s})
        timings = {name: sum(rank.get(name, 0.0) for rank in ranks) / len(ranks) for rank in ranks for name in rank}
        generated = merge([merge(rounds) for rounds in gather_objects(self._generated)])
        self._constant_rewards.update(generated.rewards)
        self.step_metrics |= generated.metrics()
        self.step_metrics |= merge(gather_objects(updates.to("cpu"))).metrics(num_ranks())
        if self._critic_updates:
            self.step_metrics |= merge(gather_objects(merge(self._critic_updates).to("cpu"))).metrics()
        self.step_metrics |= {f"timing_s/{stage}": value for stage, value in timings.items()}
        self.step_metrics["perf/rollout_tokens_per_s"] = (
            generated.num_generated_tokens / max(generated.elapsed_s, 1e-9) * num_ranks()
        )
        if "update_actor" in timings:
            self.step_metrics["perf/trained_tokens_per_s"] = (
                self.step_metrics["perf/trained_tokens"] / timings["update_actor"]
            )
        self.step_metrics["policy_version"] = float(self.policy_version)
        for name, value in self.step_metrics.items():
            self.log(name, value, prog_bar=name == "reward")
        self.log("tokens/s", self.step_metrics["perf/rollout_tokens_per_s"], prog_bar=True, logger=False)


def require_rlvr_module(callback: L.Callback, pl_module: L.LightningModule) -> RLVRModule:
    """The module, if it is one that this library's callbacks work with.

    Raises:
        MisconfigurationException: it is another LightningModule.
    """
    if not isinstance(pl_module, RLVRModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} works with an RLVRModule such as GRPO, got {type(pl_module).__name__}"
        )
    return pl_module
