"""Trains a drafter on the policy's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_specrl.distributed.collectives import average_gradients, num_ranks, sum_over_ranks
from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.draft_losses import DraftedTokens, DraftLoss, ForwardKL
from lit_specrl.drafting.distillation.entropy import policy_entropy
from lit_specrl.drafting.distillation.loss import (
    draft_kl,
    draft_overlap,
    expected_acceptance,
    expected_acceptance_length,
)
from lit_specrl.drafting.networks import DraftNetwork, DraftStep


@dataclass(frozen=True)
class DrafterEvaluation:
    """How well a drafter does on some samples: sums, so that those of several batches and ranks can be added."""

    kl_sum: float = 0.0
    """Nats."""
    num_tokens: int = 0
    accepted_sum: tuple[float, ...] = ()
    """Per draft step: sum of the probabilities that its token is accepted, if all before it were."""
    num_drafted: tuple[float, ...] = ()
    length_sum: float = 0.0
    """Tokens emitted per draft, the policy's own included."""
    num_drafts: int = 0
    entropy_sum: float = 0.0
    """Nats, of the policy at the places of the drafted tokens."""

    def __add__(self, other: DrafterEvaluation) -> DrafterEvaluation:
        return DrafterEvaluation(
            self.kl_sum + other.kl_sum,
            self.num_tokens + other.num_tokens,
            _added(self.accepted_sum, other.accepted_sum),
            _added(self.num_drafted, other.num_drafted),
            self.length_sum + other.length_sum,
            self.num_drafts + other.num_drafts,
            self.entropy_sum + other.entropy_sum,
        )

    @property
    def kl(self) -> float:
        """Mean forward KL from policy to drafter, in nats per drafted token."""
        return self.kl_sum / max(self.num_tokens, 1)

    @property
    def entropy(self) -> float:
        """Mean entropy of the policy (`policy_entropy`), in nats per drafted token."""
        return self.entropy_sum / max(self.num_tokens, 1)

    @property
    def acceptance(self) -> list[float]:
        """Per draft step, share of its tokens that would be accepted if all before them were."""
        return [total / max(count, 1) for total, count in zip(self.accepted_sum, self.num_drafted, strict=True)]

    @property
    def acceptance_length(self) -> float:
        """Tokens per step of the engine: the accepted ones and the policy's own."""
        return self.length_sum / max(self.num_drafts, 1)


class DrafterTrainer:
    """Trains a drafter towards the policy.

    ReSpec's loss (Chen et al. 2025, arXiv 2510.26475), over the steps of a draft as EAGLE-3 unrolls them (Li et al.
    2025, arXiv 2503.01840).

    Args:
        network: the drafter.
        optimizer: of its parameters.
        num_steps: drafted tokens, K.
        temperature: softmax temperature that the policy is sampled at.
        step_decay: weight of a draft step relative to the one before; `None` for that of the loss.
        micro_batch_tokens: most tokens, padding included, in one forward and backward pass.
        max_grad_norm: gradients are scaled down to this norm.
        loss: what is made small; `None` for the KL divergence.
    """

    def __init__(
        self,
        network: DraftNetwork,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        temperature: float = 1.0,
        step_decay: float | None = None,
        micro_batch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
        loss: DraftLoss | None = None,
    ) -> None:
        self.network, self.optimizer, self.num_steps = network, optimizer, num_steps
        self.loss = ForwardKL() if loss is None else loss
        self.temperature, self.step_decay = temperature, step_decay
        self.micro_batch_tokens, self.max_grad_norm = micro_batch_tokens, max_grad_norm

    def update(self, samples: Sequence[DistillationSample]) -> float:
        """One optimizer step on the samples of all ranks; a non-finite gradient is thrown away.

        Args:
            samples: of this rank, maybe none.

        Returns:
            Loss of all ranks per drafted token, weighted; in the unit of the loss, which is nats for the KL divergence.
        """
        loss_sum, count = self._accumulate(samples)
        sums = sum_over_ranks(torch.tensor([loss_sum, count], dtype=torch.float64, device=self.network.device))
        parameters = self.network.parameters
        for parameter in parameters:
            if parameter.grad is None:  # nothing to learn from on this rank
                parameter.grad = torch.zeros_like(parameter)
        average_gradients(parameters)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad *= num_ranks() / max(float(sums[1]), 1.0)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(sums[0]) / max(float(sums[1]), 1.0)

    def _accumulate(self, samples: Sequence[DistillationSample]) -> tuple[float, float]:
        """Add the gradient of the summed loss; returns the sum and what to divide it by."""
        loss_sum = count = 0.0
        for part in micro_batches(samples, self.micro_batch_tokens):
            steps = [self._drafted(part, step) for step in self.network.draft_steps(part, self.num_steps)]
            decay = self.loss.step_decay if self.step_decay is None else self.step_decay
            loss = self.loss(steps, self.num_steps, decay)
            loss.weighted_sum.backward()
            loss_sum, count = loss_sum + float(loss.weighted_sum.detach()), count + loss.count
        return loss_sum, count

    def _drafted(self, samples: Sequence[DistillationSample], step: DraftStep) -> DraftedTokens:
        weights = torch.tensor([sample.weight for sample in samples])[step.rows].to(step.logits.device)
        targets = _targets(samples, step)
        return DraftedTokens(step.logits / self.temperature, *targets, weights, step.rows, step.places)

    @torch.no_grad()
    def evaluate(self, samples: Sequence[DistillationSample]) -> DrafterEvaluation:
        """How well the drafter does, in theory: what is accepted of drafts that are sampled behind every token."""
        found = DrafterEvaluation()
        for part in micro_batches(samples, self.micro_batch_tokens):
            found += self._evaluate(part)
        return found

    @torch.no_grad()
    def rejection(self, samples: Sequence[DistillationSample]) -> Tensor:
        """Share of each response's first draft tokens that the policy would reject.

        Returns:
            [N]; 0 for responses in which nothing is drafted.
        """
        rejected = {id(sample): 0.0 for sample in samples}
        for part in micro_batches(samples, self.micro_batch_tokens):
            step = next(iter(self.network.draft_steps(part, 1)))
            drafted = self._drafted(part, step)
            values = 1 - draft_overlap(*drafted.outcomes).cpu()
            sums = torch.zeros(len(part), dtype=values.dtype).index_add(0, step.rows, values)
            for sample, total in zip(part, sums.tolist(), strict=True):
                rejected[id(sample)] = total / max(sample.num_response_tokens - 1, 1)
        return torch.tensor([rejected[id(sample)] for sample in samples])

    def _evaluate(self, samples: Sequence[DistillationSample]) -> DrafterEvaluation:
        width = max(sample.num_response_tokens for sample in samples)
        probabilities = torch.full((self.num_steps, len(samples), width), torch.nan)  # by place of the drafted token
        kl_sum, entropy_sum, num_tokens = 0.0, 0.0, 0
        for index, step in enumerate(self.network.draft_steps(samples, self.num_steps)):
            top_tokens, top_logprobs, log_mass = _targets(samples, step)
            logits = step.logits / self.temperature
            kl_sum += float(draft_kl(logits, top_tokens, top_logprobs, log_mass).sum())
            entropy_sum += float(policy_entropy(top_logprobs).sum())
            num_tokens += len(step.rows)
            accepted = expected_acceptance(logits, top_tokens, top_logprobs).float().cpu()
            probabilities[index, step.rows, step.places] = accepted
            last = index
        for index in range(last + 1, self.num_steps):  # drafts all tokens alike
            probabilities[index, :, index + 1 :] = probabilities[last, :, index + 1 :]
        # entry t of step s belongs to the draft whose first token is at place t
        drafts = torch.stack([_shifted(probabilities[step], step) for step in range(self.num_steps)])  # [K, N, R]
        whole = ~drafts.isnan().any(0)  # [N, R]
        num_drafts = int(whole.sum())
        mean_length = expected_acceptance_length(list(drafts[:, whole])) if num_drafts else 0.0
        tried = ~drafts.isnan()
        return DrafterEvaluation(
            kl_sum,
            num_tokens,
            tuple(drafts.nan_to_num().sum((1, 2)).tolist()),
            tuple(tried.sum((1, 2)).tolist()),
            float(mean_length) * num_drafts,
            num_drafts,
            entropy_sum,
        )


def micro_batches(samples: Sequence[DistillationSample], max_tokens: int) -> Iterator[list[DistillationSample]]:
    """Samples of similar length together, at most `max_tokens` tokens at a time, padding included; longer ones alone.

    Samples in which nothing is drafted (responses of one token) are left out.
    """
    batch: list[DistillationSample] = []
    for sample in sorted((sample for sample in samples if sample.num_response_tokens > 1), key=len):
        if batch and len(sample) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _targets(samples: Sequence[DistillationSample], step: DraftStep) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens [T, k], their log-probs [T, k] and the log mass [T] at the drafted places."""
    starts = torch.tensor([0, *(sample.num_response_tokens for sample in samples)]).cumsum(0)
    index = starts[step.rows] + step.places
    device = step.logits.device
    return (
        torch.cat([sample.top_tokens for sample in samples])[index].long().to(device),
        torch.cat([sample.top_logprobs for sample in samples])[index].to(device),
        torch.cat([sample.log_mass for sample in samples])[index].to(device),
    )


def _shifted(values: Tensor, step: int) -> Tensor:
    """[N, R] `step` columns to the left, NaN where there is nothing."""
    return torch.cat([values[:, step:], values.new_full((len(values), step), torch.nan)], dim=1)[:, : values.shape[1]]


def _added(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    if not first or not second:
        return tuple(first or second)
    return tuple(a + b for a, b in zip(first, second, strict=True))
