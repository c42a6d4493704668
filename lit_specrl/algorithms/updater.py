"""Optimizer steps: from the experience of a step to new weights of policy and critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_specrl.algorithms.dynamic_sampling import groups_with_spread
from lit_specrl.algorithms.gradient_step import GradientStep
from lit_specrl.algorithms.micro_batch_size import choose_micro_batch_tokens
from lit_specrl.algorithms.objective import Objective
from lit_specrl.algorithms.step_report import StepReport
from lit_specrl.distributed.collectives import average_gradients, num_ranks, sum_over_ranks
from lit_specrl.experience import Experience, rows_with_gradient
from lit_specrl.losses import Aggregation, token_weights
from lit_specrl.metrics import UpdateStatistics
from lit_specrl.models.critic import Critic
from lit_specrl.models.scorer import Scorer
from lit_specrl.types import SamplingConfig


class Updater:
    """Updates policy and critic; the gradient is the same however the rows are cut into micro-batches.

    Args:
        scorer: runs forward passes.
        objective: the loss of each token of the policy.
        critic: `None` without one.
        policy_step: applies the policy's gradient.
        critic_step: applies the critic's gradient.
        sampling: of the rollouts.
        backward: runs a backward pass, adding to the gradients of this rank.
        report: is told what the updates did.
        only_groups_with_spread: other groups only fill the batch up (dynamic sampling).
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        critic: Critic | None,
        *,
        policy_step: GradientStep,
        critic_step: GradientStep,
        sampling: SamplingConfig,
        backward: Callable[[Tensor], None],
        report: StepReport,
        only_groups_with_spread: bool,
    ) -> None:
        self.scorer, self.objective, self.critic = scorer, objective, critic
        self.policy_step, self.critic_step = policy_step, critic_step
        self.sampling, self.backward, self.report = sampling, backward, report
        self.only_groups_with_spread = only_groups_with_spread

    def update_policy(
        self, experience: Experience, optimizer: Any, critic_optimizer: Any, *, kl_coef: float, step: int
    ) -> bool:
        """One optimizer step of the policy, and of a critic that shares its passes.

        Args:
            experience: rows of the update.
            optimizer: the policy's.
            critic_optimizer: the critic's; `None` without one.
            kl_coef: weight of the KL penalty in the loss.
            step: number of the training step.

        Returns:
            Whether the policy has changed.
        """
        critic = self.critic if self.critic is not None and self.critic.updates_with_policy else None
        is_warm_up = self.warms_up(step)
        steps = [] if is_warm_up else [(self.policy_step, optimizer)]
        if critic is not None:
            critic.begin_update(self.scorer.policy, is_warm_up)
            steps.append((self.critic_step, critic_optimizer))
        if not steps:
            return False
        with self.report.timer("update_actor"):
            self._accumulate(experience, critic, steps, kl_coef, step)
            applied = [self._apply_gradient(gradient_step, owner, step) for gradient_step, owner in steps]
        return not is_warm_up and applied[0]

    def _accumulate(
        self,
        experience: Experience,
        critic: Critic | None,
        steps: Sequence[tuple[GradientStep, Any]],
        kl_coef: float,
        step: int,
    ) -> None:
        """Gradients of policy and sharing critic."""
        for _, owner in steps:
            owner.zero_grad()
        weights = self._token_weights(experience, self.objective.policy_loss.aggregation)
        value_weights = weights if critic is None else self._token_weights(experience, "token")
        rows, layout = self.trained_rows(experience, kl_coef, step), experience.layout
        update = UpdateStatistics(
            num_updates=1,
            trained_tokens=sum(
                layout.prompt_lengths[layout.prompt_index[row]] + layout.response_lengths[row] for row in rows
            ),
            rows_without_gradient=experience.num_rows - len(rows),
        )
        for micro_batch, row_numbers, part in self.scorer.micro_batches(experience, rows, self.report.timer.tell):
            cut = row_numbers, slice(part.response_ids.shape[1])
            statistics = self.scorer.training_forward(part, micro_batch)
            per_token_loss, found = self.objective(statistics, part, kl_coef)  # [n, R]
            loss = (per_token_loss * weights[cut]).sum()
            if experience.old_logprobs is None:
                experience.record_logprobs(statistics.logprobs.detach(), row_numbers)
            if self.warms_up(step):
                loss = torch.zeros_like(loss)
            if critic is not None:
                loss, critic_found = critic.add_loss(loss, statistics, part, value_weights[cut])
                if critic_found is not None and not micro_batch.is_dummy:
                    self.report.critic_updates.append(critic_found)
            self.backward(loss * (not micro_batch.is_dummy))
            if not micro_batch.is_dummy:
                update += replace(
                    found,
                    loss=loss.detach() / num_ranks(),
                    computed_tokens=micro_batch.num_tokens,
                    real_tokens=micro_batch.num_real_tokens,
                )
        self.report.updates += update
        if not self.warms_up(step):
            self._adapt_entropy_bonus(update)

    def _adapt_entropy_bonus(self, update: UpdateStatistics) -> None:
        entropy = self.objective.entropy
        if entropy.target is not None:
            self.report.metrics["entropy_coef"] = entropy.value
            sums = [value.to(self.scorer.policy.device) for value in (update.entropy_sum, update.num_tokens)]
            entropy_sum, num_tokens = sum_over_ranks(torch.stack(sums).float()).tolist()
            if num_tokens:
                entropy.update(entropy_sum / num_tokens)

    def update_critic(self, experience: Experience, optimizer: Any, step: int) -> None:
        """One optimizer step of a critic with passes of its own; nothing for others."""
        if self.critic is None or self.critic.updates_with_policy:
            return
        with self.report.timer("update_critic"):
            optimizer.zero_grad()
            weights = self._token_weights(experience, "token")
            rows = rows_with_gradient(experience, every_row_matters=True)
            for micro_batch, row_numbers, part in self.scorer.micro_batches(experience, rows, self.report.timer.tell):
                values = self.critic(*part.inputs, share_prompts=micro_batch.share_prompts, layout=part.layout)
                per_token_loss, found = self.critic.loss(values, part)  # [n, R]
                loss = (per_token_loss * weights[row_numbers, : values.shape[1]]).sum()
                self.backward(loss * (not micro_batch.is_dummy))
                if not micro_batch.is_dummy:
                    self.report.critic_updates.append(found)
            self._apply_gradient(self.critic_step, optimizer, step)

    def size_micro_batches(self, optimizers: Sequence[Any], max_length: int | None) -> int:
        """Choose the size of micro-batches; arguments as those of `choose_micro_batch_tokens`."""
        on_gpu = self.scorer.policy.device.type == "cuda"
        with self.report.timer("measure_memory") if on_gpu else nullcontext():
            found = choose_micro_batch_tokens(self.scorer, self.backward, optimizers, max_length)
        self.scorer.micro_batch_tokens = found
        return found

    def warms_up(self, step: int) -> bool:
        """Whether the critic learns alone in this training step."""
        return self.critic is not None and step < self.critic.warmup_steps

    def trained_rows(self, experience: Experience, kl_coef: float, step: int) -> list[int]:
        """Rows that the next policy update computes; of the others the gradient is zero."""
        shares_passes = self.critic is not None and self.critic.updates_with_policy
        if self.warms_up(step) and not shares_passes:
            return []
        by_objective = self.objective.entropy.is_on or self.objective.policy_loss.needs_every_row
        every_row_matters = kl_coef > 0 or shares_passes or by_objective
        return rows_with_gradient(experience, every_row_matters=every_row_matters)

    def _token_weights(self, experience: Experience, aggregation: Aggregation) -> Tensor:
        """What each token weighs in the loss of all ranks together, [N, R]."""
        num_rows = torch.full((), experience.num_rows, device=experience.loss_mask.device)
        if self.only_groups_with_spread:
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

    def _apply_gradient(self, gradient_step: GradientStep, optimizer: Any, step: int) -> bool:
        """Update from the gradients of all ranks; says whether it was done."""
        # not the model's: between passes some of those are whole ones, which get no gradient
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self.scorer.is_sharded:
            average_gradients(parameters)
        applied, metrics = gradient_step(optimizer, parameters, step)
        self.report.metrics |= metrics
        # where autocast caches its bf16 copies of the weights (Lightning's own plugin does not), they are of before
        torch.clear_autocast_cache()
        return applied
