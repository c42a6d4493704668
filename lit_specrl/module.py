"""The algorithms as LightningModules: one `RLVRModule`, one thin class per paper."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer

from lit_specrl.advantages import ScaleRewards, frac_reward_zero_std, group_advantages
from lit_specrl.allocator import keep_freed_memory
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.evaluation import AccuracyMeter
from lit_specrl.experience import active_rows, padded_experience
from lit_specrl.losses import (
    ImportanceSampling,
    KLEstimator,
    PolicyLoss,
    kl_penalty,
    resolve_loss_type,
    token_weights,
)
from lit_specrl.masking import masked_sum
from lit_specrl.metrics import UpdateStatistics, completion_metrics, reward_metrics
from lit_specrl.micro_batches import MicroBatch, plan_micro_batches
from lit_specrl.policy import Policy, TokenStatistics, check_model_exists, unreachable_model_message
from lit_specrl.rewards import Reward, RewardSet
from lit_specrl.rewards.answers import extract_answer
from lit_specrl.rewards.reward_set import RewardScores
from lit_specrl.rollout import RolloutEngine, TransformersEngine, VLLMEngine
from lit_specrl.seeds import rollout_seeds
from lit_specrl.strategy import FSDP2Strategy  # noqa: F401 (registers strategy="fsdp2")
from lit_specrl.timing import StageTimer
from lit_specrl.types import Experience, PromptBatch, RolloutProgress, RolloutRequest, Rollouts, SamplingConfig


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 1e-6 without weight decay, in one fused pass over the parameters."""
    return torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


class RLVRModule(L.LightningModule):
    """Reinforcement learning with verifiable rewards: generate, score, compare within the group, update.

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
        loss_type: "grpo", "dapo", "dr_grpo", "bnpo", "cispo" or "gspo": surrogate and normalisation (`lit_specrl.losses.LOSS_TYPES`).
        epsilon: how far the probability ratio may fall below 1 before it is clipped.
        epsilon_high: how far it may rise above 1; `None` means `epsilon`.
        delta: largest ratio that enters the loss of a token with negative advantage; `None` for no bound.
        scale_rewards: divide advantages by the standard deviation of the "group", of the "batch", or not ("none").
        beta: weight of the KL penalty towards the initial policy; 0 loads no reference model.
        kl_estimator: "k1", "k2" or "k3" (Schulman 2020).
        importance_sampling: correction of the difference between the engine's and the policy's log-probs; `None` for none.
        mask_truncated_completions: leave responses that were cut at the length limit out of the loss.
        num_iterations: passes over the rollouts of a step.
        num_minibatches: updates per pass; the groups of a step are dealt out in order.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass. Changes memory and speed,
            not the result.
        max_grad_norm: gradients are scaled down to this norm.
        max_skipped_updates: successive updates with a non-finite gradient after which the run stops.
        optimizer: makes the optimizer from the policy's parameters.
        lr_scheduler: makes the learning rate schedule from the optimizer; stepped once per step. `None` keeps the rate constant.
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
        scale_rewards: ScaleRewards = "group",
        beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        importance_sampling: ImportanceSampling | None = ImportanceSampling(),
        mask_truncated_completions: bool = False,
        num_iterations: int = 1,
        num_minibatches: int = 1,
        micro_batch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
        max_skipped_updates: int = 3,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sampling = SamplingConfig(num_generations, max_completion_length, temperature, top_p, top_k)
        if temperature == 0:
            raise ValueError(
                "temperature must be positive in training, got 0; greedy rollouts of a group are all the same"
            )
        if importance_sampling is not None and self.sampling.is_truncated:
            raise ValueError(
                f"importance_sampling is biased under top_p={top_p} and top_k={top_k}: the engine's log-probs belong to the "
                "truncated distribution; use top_p=1.0 without top_k, or importance_sampling=None"
            )
        for name, value in {
            "num_iterations": num_iterations,
            "num_minibatches": num_minibatches,
            "micro_batch_tokens": micro_batch_tokens,
            "max_skipped_updates": max_skipped_updates,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}; 0 switches the KL penalty off")
        loss = resolve_loss_type(loss_type)
        self.policy_loss = PolicyLoss(
            epsilon,
            epsilon_high,
            delta,
            importance_sampling_level=loss.importance_sampling_level,
            surrogate=loss.surrogate,
        )
        self.aggregation = loss.aggregation
        self.model_name = model
        self.eval_sampling = eval_sampling or SamplingConfig(1, max_completion_length, temperature, top_p, top_k)
        self.rewards = RewardSet(list(rewards))
        self.scale_rewards: ScaleRewards = scale_rewards
        self.beta = beta
        self.kl_estimator: KLEstimator = kl_estimator
        self.importance_sampling = importance_sampling
        self.mask_truncated_completions = mask_truncated_completions
        self.num_iterations = num_iterations
        self.num_minibatches = num_minibatches
        self.micro_batch_tokens = micro_batch_tokens
        self.max_grad_norm = max_grad_norm
        self.max_skipped_updates = max_skipped_updates
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.policy_options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.seed = seed
        self.settings = {
            "model": model,
            "rewards": ", ".join(f"{reward.weight:g} {reward.name}" for reward in self.rewards.rewards),
            **vars(self.sampling),
            "loss_type": loss_type,
            "epsilon": epsilon,
            "epsilon_high": epsilon if epsilon_high is None else epsilon_high,
            "scale_rewards": scale_rewards,
            "beta": beta,
            "num_iterations": num_iterations,
            "num_minibatches": num_minibatches,
            "max_grad_norm": max_grad_norm,
            "dtype": dtype,
            "seed": seed,
        }  # for the logger's table of runs

        self.policy: Policy | None = None
        self.engine: RolloutEngine | None = None
        self._frozen: list[Policy] = []  # the reference, kept out of checkpoints by not being a submodule
        self._engine_started = False
        self.step = 0
        self.policy_version = 0
        self.skipped_updates = 0
        self.timer = StageTimer()
        self.step_metrics: dict[str, float] = {}  # of the latest training step, as logged
        self.evaluation: dict[str, float] = {}  # of the latest validation or test, as logged
        self._meters: dict[int, AccuracyMeter] = {}

    # ---------------------------------------------------------------------------------------------------------- set-up

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the policy; read without its weights."""
        try:
            return AutoTokenizer.from_pretrained(self.model_name)
        except OSError as error:
            raise ValueError(unreachable_model_message(self.model_name)) from error

    def setup(self, stage: str) -> None:
        check_model_exists(self.model_name)
        if self.trainer.precision == "16-mixed":
            raise MisconfigurationException(
                "precision='16-mixed' scales the loss, which manual gradient clipping does not know of; use 'bf16-mixed' or '32-true'"
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.engine, VLLMEngine):
            raise MisconfigurationException(
                "TransformersEngine cannot generate with sharded weights; add SpeculativeRollout(engine=VLLMEngine()), or "
                "use strategy='ddp'"
            )
        batch_size = getattr(self._datamodule, "batch_size", None)
        if stage == "fit" and batch_size is not None and batch_size // self.trainer.world_size % self.num_minibatches:
            raise MisconfigurationException(
                f"{batch_size // self.trainer.world_size} prompts a step and rank (batch_size={batch_size}) cannot be divided "
                f"into num_minibatches={self.num_minibatches}; make batch_size a multiple of it"
            )
        positions = AutoConfig.from_pretrained(self.model_name).get_text_config().max_position_embeddings
        if self.max_length is not None and self.max_length > positions:
            raise MisconfigurationException(
                f"prompts and responses of up to {self.max_length} tokens do not fit the {positions} positions of "
                f"{self.model_name}; lower max_prompt_length or max_completion_length"
            )

    @property
    def max_length(self) -> int | None:
        """Longest prompt plus response of the run, in tokens; `None` where the data does not bound its prompts."""
        data = self._datamodule
        prompt_length = getattr(data, "max_prompt_length", None)
        if prompt_length is None:
            return None
        samplings = [self.sampling, self.eval_sampling, *getattr(data, "sampling", {}).values()]
        return prompt_length + max(sampling.max_completion_length for sampling in samplings if sampling)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self.policy = Policy.build(self.model_name, **self.policy_options)
        if self.beta:
            reference = Policy.build(self.model_name, **{**self.policy_options, "gradient_checkpointing": False})
            self._frozen = [reference.requires_grad_(False).eval()]
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for policy in [self.policy, *self._frozen]:
                policy.to(self.trainer.strategy.root_device).shard(self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        optimizer = self.make_optimizer(
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        )
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def teardown(self, stage: str) -> None:
        self.rewards.close()
        self.stop_engine()

    def stop_engine(self) -> None:
        """Shut the engine down; the next rollout starts it again."""
        if self.engine is not None and self._engine_started:
            self.engine.shutdown()
        self._engine_started = False

    # ------------------------------------------------------------------------------------------------------- algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.step_metrics = {}
        started_at = time.perf_counter()
        rollouts = self.generate(batch, self.sampling, purpose=f"train/{self.step}")
        scores = self.score(rollouts)
        experience = self.make_experience(rollouts, scores)
        self._hook("on_experience_end", rollouts, experience)
        updates = UpdateStatistics()
        for _ in range(self.num_iterations):
            for minibatch in experience.minibatches(self.num_minibatches):
                updates += self.update_policy(minibatch)
        self.step_metrics |= updates.metrics()
        self._step_lr_scheduler()
        self.step += 1
        self._log_step(rollouts, time.perf_counter() - started_at)

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str) -> Rollouts:
        """Sample responses under the current policy.

        Args:
            prompts: B prompts.
            sampling: how to sample; G per prompt.
            purpose: what the rollouts are for; decides their seeds, see `rollout_seeds`.
        """
        seeds = rollout_seeds(self.seed, purpose, prompts.uids, sampling.num_generations)
        request = RolloutRequest(prompts, sampling, seeds, self.policy_version)
        self._hook("on_rollout_start", request)
        engine = self._current_engine()
        with self.timer("gen"):
            rollouts = engine.generate(request, on_progress=self._report_progress)
            rollouts.texts = self.tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
        self._hook("on_rollout_end", rollouts)
        return rollouts

    def score(self, rollouts: Rollouts) -> RewardScores:
        """Ask every reward about every row."""
        prompts, request = rollouts.prompts, rollouts.request
        owners = [request.prompt_index(row) for row in range(rollouts.num_rows)]
        names = {name for columns in prompts.columns for name in columns}
        columns: dict[str, list[Any]] = {name: [prompts.columns[owner].get(name) for owner in owners] for name in names}
        with self.timer("reward"):
            scores = self.rewards(
                [prompts.prompts[owner] for owner in owners],
                rollouts.texts,
                **columns
                | {
                    "answer": [prompts.answers[owner] for owner in owners],
                    "source": [prompts.sources[owner] for owner in owners],
                    "completion_ids": rollouts.response_ids,
                    "finish_reason": rollouts.finish_reasons,
                },
            )
        rollouts.rewards = dict(zip(scores.names, scores.values, strict=True))
        return scores

    def make_experience(self, rollouts: Rollouts, scores: RewardScores) -> Experience:
        """Advantages, and the log-probs that the loss cannot do without."""
        rewards = torch.tensor(scores.total, dtype=torch.float32)  # [N]
        scored = torch.tensor([any(value is not None for value in row) for row in zip(*scores.values, strict=True)])
        advantages = group_advantages(
            rewards.masked_fill(~scored, torch.nan), self.sampling.num_generations, self.scale_rewards
        )  # [N]
        self.step_metrics |= reward_metrics(scores, rewards, self.sampling.num_generations)
        self.step_metrics["frac_reward_zero_std"] = float(frac_reward_zero_std(rewards, self.sampling.num_generations))
        experience = padded_experience(rollouts, rewards, advantages, self.mask_truncated_completions).to(self.device)
        if self.num_iterations * self.num_minibatches > 1:  # otherwise the training forward gives them
            with self.timer("old_log_prob"):
                experience.old_logprobs = self.token_logprobs(self.policy, experience)
        if self.beta:
            with self.timer("ref"):
                experience.reference_logprobs = self.token_logprobs(self._frozen[0].to(self.device), experience)
        return experience

    @torch.no_grad()
    def token_logprobs(self, policy: Policy | None, experience: Experience) -> Tensor:
        """Log-probs of all response tokens under `policy`, [N, R]."""
        assert policy is not None
        result = torch.zeros_like(experience.sampling_logprobs)
        for micro_batch in self._plan(experience, list(range(experience.num_rows))):
            part = experience.select(micro_batch.rows)
            result[micro_batch.rows, : part.response_ids.shape[1]] = self._forward(policy, part, micro_batch).logprobs
        return result

    def update_policy(self, experience: Experience) -> UpdateStatistics:
        """One optimizer step on the given rows; the gradient is the same however they are cut into micro-batches."""
        with self.timer("update_actor"):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            weights = token_weights(
                experience.loss_mask,
                self.aggregation,
                num_tokens=self._sum_over_ranks(experience.loss_mask.sum()),
                num_sequences=self._sum_over_ranks(torch.tensor(experience.num_rows, device=self.device)),
                max_completion_length=self.sampling.max_completion_length,
                num_ranks=self.trainer.world_size,
            )
            rows = active_rows(experience, every_row_matters=self.beta > 0)
            plan = self._plan(experience, rows)
            update = UpdateStatistics(
                num_updates=1,
                trained_tokens=int((experience.prompt_lengths + experience.response_lengths)[rows].sum()),
                rows_without_gradient=experience.num_rows - len(rows),
            )
            for micro_batch in plan:
                update += self._accumulate_gradient(experience, weights, micro_batch)
            self._apply_gradient(optimizer)
        return update

    def _accumulate_gradient(
        self, experience: Experience, weights: Tensor, micro_batch: MicroBatch
    ) -> UpdateStatistics:
        part = experience.select(micro_batch.rows)
        statistics = self._forward(self.policy, part, micro_batch)
        logprobs, mask = statistics.logprobs, part.loss_mask
        per_token_loss, clipped = self.policy_loss(logprobs, part.old_logprobs, part.advantages, mask)  # [n, R]
        old_logprobs = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        correction, mismatch = (self.importance_sampling or ImportanceSampling())(
            old_logprobs, part.sampling_logprobs, mask
        )
        if self.importance_sampling is not None:
            per_token_loss = per_token_loss * correction
        kl_sum = None
        if part.reference_logprobs is not None:
            kl = kl_penalty(logprobs, part.reference_logprobs, mask, self.kl_estimator)
            per_token_loss = per_token_loss + self.beta * kl
            kl_sum = masked_sum(kl.detach(), mask)
        part_weights = weights[micro_batch.rows, : mask.shape[1]]
        loss = (per_token_loss * part_weights).sum()
        self.manual_backward(loss if micro_batch.counts else loss * 0)
        if not micro_batch.counts:
            return UpdateStatistics()
        return UpdateStatistics(
            loss=loss.detach() / self.trainer.world_size,
            entropy_sum=masked_sum(statistics.entropy, mask),
            kl_sum=kl_sum,
            num_tokens=mask.sum(),
            clipped=clipped,
            mismatch=mismatch,
            computed_tokens=micro_batch.num_tokens,
            real_tokens=micro_batch.num_real_tokens,
        )

    def _apply_gradient(self, optimizer: Any) -> None:
        assert self.policy is not None
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.step_metrics["actor/grad_norm"] = float(norm)
        if torch.isfinite(norm):
            optimizer.step()
            self.policy_version += 1
            self.skipped_updates = 0
        else:
            optimizer.zero_grad()
            self.skipped_updates += 1
            rank_zero_warn(f"step {self.step}: gradient norm is {float(norm)}, the update was skipped")
            if self.skipped_updates >= self.max_skipped_updates:
                raise RuntimeError(
                    f"{self.skipped_updates} successive updates had a non-finite gradient; lower the learning rate, or look "
                    "for rewards and log-probs that are not finite"
                )
        self.step_metrics["actor/skipped_updates"] = float(self.skipped_updates)
        # where autocast caches its bf16 copies of the weights (Lightning's own plugin does not), they are of before the update
        torch.clear_autocast_cache()

    def _step_lr_scheduler(self) -> None:
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        self.step_metrics["actor/lr"] = float(optimizer.param_groups[0]["lr"])
        if scheduler is not None:
            scheduler.step()

    # ------------------------------------------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._meters = {}

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"validation/{self.step}", self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation()

    def on_test_epoch_start(self) -> None:
        self._meters = {}

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"test/{self.step}", self.trainer.test_dataloaders)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation()

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Responses to the prompts of a batch, as one record per row."""
        rollouts = self.generate(batch, batch.sampling or self.eval_sampling, purpose=f"predict/{self.step}")
        return [
            {
                "uid": batch.uids[owner],
                "source": batch.sources[owner],
                "prompt": batch.prompts[owner],
                "answer": batch.answers[owner],
                "completion": rollouts.texts[row],
                "completion_length": len(rollouts.response_ids[row]),
                "finish_reason": rollouts.finish_reasons[row],
            }
            for row in range(rollouts.num_rows)
            for owner in [rollouts.request.prompt_index(row)]
        ]

    def _evaluate(self, batch: PromptBatch, purpose: str, loaders: Any) -> None:
        sampling = batch.sampling or self.eval_sampling
        rollouts = self.generate(batch, sampling, purpose)
        scores = self.score(rollouts)
        size = sampling.num_generations
        if size not in self._meters:
            self._meters[size] = AccuracyMeter(self._sources(loaders), size).to(self.device)
        answer_format = getattr(self.rewards.rewards[0], "answer_format", "text")
        for index, source in enumerate(batch.sources):
            rows = range(index * size, (index + 1) * size)
            self._meters[size].update(
                source,
                correct=[scores.values[0][row] or 0.0 for row in rows],
                answers=[extract_answer(rollouts.texts[row], answer_format) for row in rows],
            )
        self.timer.pop()  # evaluation is not part of the next step

    def _sources(self, loaders: Any) -> list[str]:
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        return sorted({source for loader in loaders for source in loader.sources})

    def _log_evaluation(self) -> None:
        metrics = {name: value for meter in self._meters.values() for name, value in meter.compute().items()}
        if not self.trainer.sanity_checking:
            self.log_dict(metrics, sync_dist=True)  # equal on all ranks already
        elif self.logger is not None and self.trainer.num_sanity_val_batches == self.trainer.num_val_batches:
            # a whole validation before training (num_sanity_val_steps=-1), which Lightning itself would throw away
            self.logger.log_metrics(metrics, step=0)
        self.evaluation = metrics

    # ---------------------------------------------------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlvr"] = {
            "model": self.model_name,
            "step": self.step,
            "policy_version": self.policy_version,
            "skipped_updates": self.skipped_updates,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["rlvr"]
        self.step, self.policy_version = state["step"], state["policy_version"]
        self.skipped_updates = state["skipped_updates"]

    # --------------------------------------------------------------------------------------------------------- helpers

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _current_engine(self) -> RolloutEngine:
        """The engine, started and holding the weights of the current policy."""
        assert self.policy is not None
        if self.engine is None:
            self.engine = TransformersEngine()
        if not self._engine_started:
            with self.timer("start_engine"):
                stop_token_ids = self.policy.eos_token_ids | {self.tokenizer.eos_token_id} - {None}
                max_length = self.max_length or self.policy.model.config.get_text_config().max_position_embeddings
                self.engine.start(self.policy, self.model_name, max_length, stop_token_ids)
            self._engine_started = True
        if self.engine.policy_version != self.policy_version:
            with self.timer("update_weights"):
                self.engine.load_weights(self.policy.named_weights(), self.policy_version)
        return self.engine

    def _plan(self, experience: Experience, rows: list[int]) -> list[MicroBatch]:
        assert self.policy is not None
        plan = plan_micro_batches(
            experience.prompt_index[rows].tolist(),
            experience.prompt_lengths[rows].tolist(),
            experience.response_lengths[rows].tolist(),
            self.micro_batch_tokens,
            self.policy.can_share_prompts,
        )
        plan = [replace(part, rows=[rows[row] for row in part.rows]) for part in plan]
        if self.trainer.world_size > 1:
            longest = self.trainer.strategy.reduce(torch.tensor(len(plan), device=self.device), reduce_op="max")
            plan += [replace(plan[-1], counts=False)] * (int(longest) - len(plan))
        return plan

    def _forward(self, policy: Policy | None, part: Experience, micro_batch: MicroBatch) -> TokenStatistics:
        assert policy is not None
        return policy(
            part.prompt_ids,
            part.prompt_mask,
            part.prompt_index,
            part.response_ids,
            part.response_mask,
            temperature=self.sampling.temperature,
            share_prompts=micro_batch.share_prompts,
        )

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self.trainer.world_size > 1 else value

    def _mean_over_ranks(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean of each metric over the ranks that report it: which rewards apply, for one, differs between ranks."""
        if self.trainer.world_size == 1:
            return metrics
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, metrics)
        values = {name: [rank[name] for rank in gathered if name in rank] for rank in gathered for name in rank}
        return {name: sum(present) / len(present) for name, present in values.items()}

    def _hook(self, name: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RolloutCallback):
                getattr(callback, name)(self.trainer, self, *arguments)

    def _report_progress(self, progress: RolloutProgress) -> None:
        self._hook("on_rollout_progress", progress)

    def _log_step(self, rollouts: Rollouts, step_s: float) -> None:
        seconds = self.timer.pop()
        seconds["other"] = step_s - sum(seconds.values())
        self.step_metrics |= completion_metrics(rollouts)
        self.step_metrics |= {f"timing_s/{stage}": value for stage, value in {**seconds, "step": step_s}.items()}
        self.step_metrics["perf/rollout_tokens_per_s"] = rollouts.num_tokens / max(rollouts.elapsed_s, 1e-9)
        self.step_metrics["perf/trained_tokens_per_s"] = (
            self.step_metrics["perf/trained_tokens"] / seconds["update_actor"]
        )
        self.step_metrics["policy_version"] = float(self.policy_version)
        for name, value in self._mean_over_ranks(self.step_metrics).items():
            self.log(name, value, prog_bar=name == "reward")
        self.log("tokens/s", self.step_metrics["perf/rollout_tokens_per_s"], prog_bar=True, logger=False)


class GRPO(RLVRModule):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300).

    The clipped surrogate of PPO with the group's mean reward as baseline, and the group's standard deviation as scale. Departs from the
    paper where today's practice does, as TRL's defaults do: the loss is averaged over all tokens of the step (`loss_type="dapo"`; the paper's mean
    of row means is "grpo"), there is no KL penalty (`beta=0`), and the engine's rounding is corrected for
    (`importance_sampling`). Arguments are those of `RLVRModule`.

    Example::

        GRPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], num_generations=8, max_completion_length=4096)
    """
