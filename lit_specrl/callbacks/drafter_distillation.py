"""A drafter that learns from the rollouts it drafts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import xxhash
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.algorithms.optimizer_settings import OptimizerSettings
from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rank_store import RankStore
from lit_specrl.callbacks.rollout_callback import RolloutCallback, callbacks_of, require_only_one, require_rlvr_module
from lit_specrl.callbacks.speculative_rollout import SpeculativeRollout
from lit_specrl.checkpoints.rank_files import DRAFTER_SAMPLES
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.drafting import Drafter
from lit_specrl.drafting.distillation.buffer import DistillationBuffer, DistillationSample
from lit_specrl.drafting.distillation.collector import TeacherOutputCollector
from lit_specrl.drafting.distillation.draft_losses import DraftLoss, resolve_draft_loss
from lit_specrl.drafting.distillation.reward_weights import WeightScope, reward_weights, weighted
from lit_specrl.drafting.distillation.samples import (
    SampleChoice,
    copied,
    cut,
    draw_scores,
    floor_fraction,
    is_held_out,
    mean,
)
from lit_specrl.drafting.distillation.trainer import DrafterEvaluation, DrafterTrainer
from lit_specrl.drafting.drafter_folders import check_output
from lit_specrl.drafting.networks import DraftNetwork
from lit_specrl.experience import Experience
from lit_specrl.types import RolloutRequest, Rollouts, check_at_least_one

_ROLLBACK_TOLERANCE = 0.01
"""Tokens of acceptance length by which a training may make the drafter worse on responses that it has not seen."""


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at 3e-4, without weight decay."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)


class DrafterDistillation(RolloutCallback):
    """Trains the drafter, step after step, to say what the policy says.

    ReSpec's online learner (Chen et al. 2025, arXiv 2510.26475): while the policy moves, a drafter that stays as it was
    is accepted less and less. Of the forward passes of the update, hidden states and most likely tokens are kept for
    some responses; at the beginning of the next step the drafter is trained on `w(r) * sum_t KL(policy || drafter)`,
    over several drafted tokens as EAGLE-3 does, and the running engine gets the new weights. Rollouts have the policy's
    distribution whatever the drafter proposes.

    A share of the responses, chosen by a hash of their tokens, is never trained on. If a training makes the drafter
    worse on these, it is undone.

    Works with `Eagle3Drafter` and `DraftModel`. `lit-specrl drafter` trains a drafter before the run, which is worth
    more than any training within it.

    Args:
        every_n_steps: steps between two trainings.
        share: of the kept responses that a training passes over; ReSpec's 1/n.
        draw_by: which these are, and in what order: at "random", or with a chance in proportion to the policy's mean
            "entropy" at their tokens or to the "rejection" that the drafter as it is would meet there, which takes it a
            pass over all kept responses. Matters for a `share` below 1, and where `max_step_fraction` ends a training.
        update_tokens: response and prompt tokens of an optimizer step.
        max_step_fraction: a training stops when it has taken this share of the time of the step before it (at least one
            optimizer step is made); `None` for no limit, as for runs that must be repeated to the bit.
        tokens_per_step: tokens of responses kept of a step, with their prompts; rows are chosen at random.
        num_top: most likely tokens whose log-probs are kept, k.
        weight_scope: whose rewards decide what a response counts: of its "group", of the "batch", or "none" for plain
            distillation.
        weight_floor: what the response of the lowest reward counts, as a fraction of that of the highest. ReSpec's w(r)
            = r is 0.
        max_weight: largest weight; the mean is 1.
        holdout_fraction: share of the responses kept for evaluation.
        step_decay: weight of a drafted token relative to the one before; `None` for 0.8, or 1 for "acceptance".
        max_bytes: most memory for kept responses on each rank.
        max_age: policy updates after which a response is forgotten.
        optimizer: makes the optimizer from the drafter's parameters.
        lr_scheduler: makes its learning rate schedule; stepped once per training.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass of the drafter.
        max_grad_norm: gradients are scaled down to this norm.
        output: folder that the drafter is written to at the end of the run, as `Eagle3Drafter(model=...)` and vLLM take
            it: a new one, an empty one, or an older drafter, which it replaces.
        seed: of the choice of responses.
        loss: what the drafter is trained to make small: "kl", ReSpec's divergence; "tv", the probability that a token
            is rejected; "acceptance", the share of a draft's tokens that is lost from its first rejection on, end to
            end (Bebop); or a `DraftLoss` by `class_path`. The two are for drafters that `lit-specrl drafter` made: a
            new one needs the divergence beside them, `AcceptedLength(kl_decay=3)`.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, without a drafter that can learn, or where `output` holds other things.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        share: float = 1.0,
        update_tokens: int = 8192,
        max_step_fraction: float | None = 0.1,
        tokens_per_step: int = 8192,
        num_top: int = 64,
        weight_scope: WeightScope = "batch",
        weight_floor: float = 0.1,
        max_weight: float = 4.0,
        holdout_fraction: float = 0.1,
        step_decay: float | None = None,
        max_bytes: int = 2**28,
        max_age: int = 8,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
        output: str | None = None,
        seed: int = 0,
        loss: str | DraftLoss = "kl",
        draw_by: SampleChoice = "random",
    ) -> None:
        check_at_least_one(
            every_n_steps=every_n_steps,
            update_tokens=update_tokens,
            tokens_per_step=tokens_per_step,
            num_top=num_top,
            micro_batch_tokens=micro_batch_tokens,
        )
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        if not 0 < holdout_fraction < 1:
            raise ValueError(f"holdout_fraction must lie in (0, 1), got {holdout_fraction}")
        if max_step_fraction is not None and max_step_fraction <= 0:
            raise ValueError(f"max_step_fraction must be positive, got {max_step_fraction}; use None for no limit")
        if draw_by not in ("random", "entropy", "rejection"):
            raise ValueError(f"draw_by must be 'random', 'entropy' or 'rejection', got {draw_by!r}")
        reward_weights(torch.zeros(1), [0], weight_scope, weight_floor, max_weight)  # refuses what is out of range
        self.every_n_steps, self.share, self.update_tokens = every_n_steps, share, update_tokens
        self.max_step_fraction, self.tokens_per_step, self.num_top = max_step_fraction, tokens_per_step, num_top
        self.weight_scope, self.weight_floor, self.max_weight = weight_scope, weight_floor, max_weight
        self.holdout_fraction, self.step_decay, self.output = holdout_fraction, step_decay, output
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.micro_batch_tokens, self.max_grad_norm = micro_batch_tokens, max_grad_norm
        self.samples = DistillationBuffer(max_bytes, max_age)
        self.version = 0
        """Trainings behind the drafter's weights."""
        self.network: DraftNetwork | None = None
        self.seed, self.loss, self.draw_by = seed, resolve_draft_loss(loss), draw_by
        self._generator, self._files = torch.Generator(), RankStore(DRAFTER_SAMPLES)
        self._newest_sample_version = 0  # policy version
        self._has_new_samples, self._step_s = False, 0.0
        self._restored: dict[str, Any] | None = None
        self._learned_from: tuple[RLVRModule, Drafter] | None = None
        self._settings = OptimizerSettings("drafter's optimizer", "`lit-specrl export --drafter` writes them")

    # ---------------------------------------------------------------------------------------------------------- set-up

    def memory(self, trainer: L.Trainer, num_parameters: int) -> dict[str, int]:
        if trainer.strategy.root_device.type != "cpu":  # the samples are on the host
            return {}
        return {"drafter's samples, at most": self.samples.max_bytes}

    def charts(self) -> dict[str, dict[str, list[Any]]]:
        return {
            "drafter": {
                "KL": ["Multiline", ["drafter/(loss|kl)"]],
                "tokens a step": ["Multiline", ["drafter/acceptance_length", "drafter/acceptance_length_before"]],
                "staleness": ["Multiline", ["drafter/staleness"]],
            }
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_rlvr_module(self, pl_module)
        require_only_one(self, trainer)
        check_output(self.output if stage == "fit" else None)
        owners = callbacks_of(trainer, SpeculativeRollout)
        drafter = owners[0].drafter if owners else None
        if drafter is None or type(drafter).network is Drafter.network:
            raise MisconfigurationException(
                "DrafterDistillation needs a drafter that can learn; give SpeculativeRollout an Eagle3Drafter() or a "
                f"DraftModel, got {type(drafter).__name__ if drafter else 'none'}"
            )
        self.drafter = drafter

    def on_train_start(self, trainer: L.Trainer, pl_module: RLVRModule) -> None:  # type: ignore[override]
        self._files.sweep(trainer)
        self.drafter.prepare(pl_module.model_name)
        if self._learned_from != (pl_module, self.drafter):  # otherwise a further fit goes on
            self._begin()
        self._learned_from, restored, self._restored = None, self._restored, None
        assert self.network is not None
        self.network.module.to(pl_module.device)
        self.collector = TeacherOutputCollector(self.network, self.num_top, self._generator)
        self.training = DrafterTrainer(
            self.network,
            self.make_optimizer(self.network.parameters),
            self.drafter.num_speculative_tokens,
            pl_module.sampling.temperature,
            self.step_decay,
            self.micro_batch_tokens,
            self.max_grad_norm,
            self.loss,
        )
        self.scheduler: Any = self.make_lr_scheduler(self.training.optimizer) if self.make_lr_scheduler else None
        self._settings.clear()
        self._settings.record([self.training.optimizer], [self.scheduler] if self.scheduler else [])
        if restored is not None:
            self._restore(trainer, pl_module, restored)
        self._learned_from = pl_module, self.drafter

    def _begin(self) -> None:
        """The drafter as its files have it, and nothing to learn from."""
        self.network = self.drafter.network()
        self.samples = DistillationBuffer(self.samples.max_bytes, self.samples.max_age)
        self.version, self._newest_sample_version, self._has_new_samples = 0, 0, False

    # ------------------------------------------------------------------------------------------------------- algorithm

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: RLVRModule, batch: Any, batch_idx: int
    ) -> None:
        """What is drawn in a step is decided by the step and the rank alone."""
        place = f"{self.seed}/{pl_module.step}/{trainer.global_rank}"
        self._generator.manual_seed(xxhash.xxh3_64_intdigest(place.encode()) >> 1)

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        """Learn from the step before, then publish: the engine drafts with the newest weights, and still has them."""
        if self.network is None:
            return
        if trainer.training and self._has_new_samples:
            if pl_module.step % self.every_n_steps == 0:
                with pl_module.timer("train_drafter"):
                    pl_module.step_metrics |= self._train()
                self._has_new_samples = False
            pl_module.step_metrics |= {
                "drafter/version": float(self.version),
                "drafter/staleness": float(pl_module.policy_version - self._newest_sample_version),
                "drafter/buffer_bytes": float(sum(gather_objects(self.samples.num_bytes))),
            }
        self._publish(pl_module)

    def _publish(self, pl_module: RLVRModule) -> None:
        assert self.network is not None
        engine = pl_module.current_engine()
        if not all(gather_objects(engine.drafter_is_intact())):
            rank_zero_warn(
                "the engine has lost the drafter's weights, they are loaded again; look for what frees its memory"
            )
        elif engine.drafter_version == self.version:
            return
        with pl_module.timer("update_drafter"):
            engine.load_drafter_weights(self.network.weights(), self.version)

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        """Observe the updates of this step."""
        num_tokens = int((experience.prompt_lengths + experience.response_lengths).sum())
        self.collector.fraction = min(1.0, self.tokens_per_step / max(num_tokens, 1))
        self.collector.num_rows_left = len(pl_module.trained_rows(experience))  # a second pass shows nothing new
        pl_module.scorer.observer = self.collector

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: RLVRModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.scorer.observer = None
        self._keep(pl_module)
        self._step_s = pl_module.step_metrics["timing_s/step"]
        self._has_new_samples = True

    def _keep(self, pl_module: RLVRModule) -> None:
        """Weigh what was kept of this step by the rewards of all ranks, and store it."""
        scope = self.weight_scope, self.weight_floor, self.max_weight
        self.samples.put(weighted(self.collector.pop(), pl_module.global_rank, *scope))
        self.samples.expire(pl_module.policy_version)

    def _train(self) -> dict[str, float]:
        """Pass over a share of the samples; back to the former weights if that has made the drafter worse."""
        assert self.network is not None
        started_at = time.perf_counter()
        budget_s = math.inf if self.max_step_fraction is None else self.max_step_fraction * self._step_s
        scores = draw_scores(self.draw_by, list(self.samples), self.training.rejection)
        held_out = [sample for sample in self.samples if is_held_out(sample, self.holdout_fraction)]
        drawn = [
            sample
            for sample in self.samples.draw(self.share, self._generator, scores)
            if not is_held_out(sample, self.holdout_fraction)
        ]
        updates = cut(drawn, self.update_tokens)
        num_updates = max(gather_objects(len(updates)))
        if num_updates == 0:
            return {}
        before = self._evaluate(held_out)
        weights = {name: weight.clone() for name, weight in self.network.weights()}
        optimizer = copied(self.training.optimizer.state_dict())
        losses = []
        for index in range(num_updates):
            losses.append(self.training.update(updates[index] if index < len(updates) else []))
            if max(gather_objects(time.perf_counter() - started_at)) > budget_s:
                break
        after = self._evaluate(held_out)
        self.version += 1
        metrics = {
            "drafter/loss": sum(losses) / len(losses),
            "drafter/updates": float(len(losses)),
            "drafter/weight_mean": mean([sample.weight for sample in drawn]),
            "drafter/weight_floor_fraction": floor_fraction(drawn),
            "drafter/rolled_back": 0.0,
        }
        if after.num_drafts and after.acceptance_length < before.acceptance_length - _ROLLBACK_TOLERANCE:
            self.network.load_weights(weights, self.network.vocabulary)
            self.training.optimizer.load_state_dict(optimizer)
            metrics["drafter/rolled_back"], after = 1.0, before
            self.version -= 1
        else:
            self._newest_sample_version = max(
                [sample.policy_version for sample in drawn], default=self._newest_sample_version
            )
        if self.scheduler is not None:  # behind a rollback, which brings the former rate back
            self.scheduler.step()
        if after.num_drafts:
            metrics |= {
                "drafter/kl": after.kl,
                "drafter/policy_entropy": after.entropy,
                "drafter/acceptance_estimate": after.acceptance[0],
                "drafter/acceptance_length": after.acceptance_length,
                "drafter/acceptance_length_before": before.acceptance_length,
            }
        return metrics | {"drafter/train_s": time.perf_counter() - started_at}

    def _evaluate(self, samples: Sequence[DistillationSample]) -> DrafterEvaluation:
        ranks = gather_objects(self.training.evaluate(samples))
        return sum(ranks[1:], start=ranks[0])

    # ---------------------------------------------------------------------------------------------------------- resume

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.network is None:
            return
        module = require_rlvr_module(self, pl_module)
        checkpoint["drafter_distillation"] = self._files.save(trainer, self.samples, self._identity(), module.step) | {
            "origin": self.drafter.origin(),
            "version": self.version,
            "newest_taught": self._newest_sample_version,
            "has_news": self._has_new_samples,
            "step_s": self._step_s,
            "weights": {name: weight.cpu() for name, weight in self.network.weights()},
            "vocabulary": None if self.network.vocabulary is None else self.network.vocabulary.cpu(),
            "optimizer": copied(self.training.optimizer.state_dict(), "cpu"),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "settings": self._settings.state_dict(),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get("drafter_distillation")

    def _restore(self, trainer: L.Trainer, pl_module: RLVRModule, state: dict[str, Any]) -> None:
        assert self.network is not None
        try:
            self.network.load_weights(state["weights"], state["vocabulary"])
        except ValueError as error:
            rank_zero_warn(f"the checkpoint's drafter is not used, that of the configuration starts as it is: {error}")
            return
        self._settings.load_state_dict(state.get("settings", {}))
        self.training.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.version, self._newest_sample_version = state["version"], state["newest_taught"]
        self._has_new_samples, self._step_s = state["has_news"], state["step_s"]
        if state["world_size"] != trainer.world_size:
            rank_zero_info("the number of ranks has changed: the drafter begins with no kept responses")
            return
        identity, kept = self._identity(), self.samples
        found = self._files.load(
            trainer,
            state,
            lambda path: DistillationBuffer.load(path, identity, kept.max_bytes, kept.max_age),
            "the responses that the drafter of rank {rank} learns from cannot be used, it waits for new ones: {error}",
        )
        self.samples = found[0] if found else kept

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._files.close(trainer)
        if self.output is not None and self.network is not None and trainer.is_global_zero:
            self.network.save(self.output)

    def _identity(self) -> dict[str, str]:
        assert self.network is not None
        vocabulary = self.network.vocabulary
        digest = "all" if vocabulary is None else xxhash.xxh3_64_hexdigest(vocabulary.cpu().numpy().tobytes())
        return {"layers": str(list(self.network.layers)), "vocabulary": digest}
