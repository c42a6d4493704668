"""What a drafter is trained to make small."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_specrl.drafting.distillation.loss import (
    DistillationLoss,
    distillation_loss,
    draft_kl,
    draft_overlap,
    prefix_acceptance,
)


class DraftedTokens(NamedTuple):
    """The tokens of step s of the drafts of some responses, and what the policy says in their places."""

    logits: Tensor
    """[T, V'] of the drafter, divided by the sampling temperature, with gradient."""
    top_tokens: Tensor
    """[T, k] long, the policy's most probable tokens, as indices into the draft vocabulary."""
    top_logprobs: Tensor
    """[T, k] nats, of these under the policy's whole softmax."""
    log_mass: Tensor
    """[T] nats, log of the policy's probability of the draft vocabulary."""
    weights: Tensor
    """[T] w(r) of the response."""
    rows: Tensor
    """[T] long, number of the response, ascending; on the host."""
    places: Tensor
    """[T] long, index of the token in its response, ascending within a row; on the host."""

    @property
    def outcomes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `draft_kl` and `draft_overlap` take."""
        return self.logits, self.top_tokens, self.top_logprobs, self.log_mass


class DraftLoss(ABC):
    """What a drafter is trained to make small: the base of losses of your own.

    Attributes:
        step_decay: weight of a draft step relative to the one before where the user gives none.

    Example: cross-entropy with the policy's most probable token, in a file of the user::

        class MostProbable(DraftLoss):
            def __call__(self, steps, num_steps, decay):
                values = [cross_entropy(step.logits, step.top_tokens[:, 0], reduction="none") for step in steps]
                return distillation_loss(values, [step.weights for step in steps], decay)
    """

    step_decay: float = 0.8

    @abstractmethod
    def __call__(self, steps: Sequence[DraftedTokens], num_steps: int, decay: float) -> DistillationLoss:
        """Compute a sum, and what to divide it by after those of all micro-batches and ranks have been added up.

        Args:
            steps: by step of the draft, those of a micro-batch. A single one where the drafter drafts all tokens alike.
            num_steps: drafted tokens, K.
            decay: weight of a step relative to the one before.
        """


class ForwardKL(DraftLoss):
    """KL divergence of the policy to the drafter (`draft_kl`), the loss of ReSpec."""

    def __call__(self, steps: Sequence[DraftedTokens], num_steps: int, decay: float) -> DistillationLoss:
        return distillation_loss([draft_kl(*step.outcomes) for step in steps], [step.weights for step in steps], decay)


class TotalVariation(DraftLoss):
    """1 - `draft_overlap`: the probability that a drafted token is rejected when all before it are accepted.

    Bebop (Li et al. 2026, arXiv 2606.12370). Its gradient vanishes where policy and drafter have little in
    common, as they have before the first training. The hybrid of LK losses (Samarin et al. 2026, arXiv 2602.23881)
    begins there with the KL divergence: lambda * KL + (1 - lambda) * TV, with lambda = exp(-kl_decay * overlap), which
    has no gradient. Lambda is each token's own, so that no loss depends on the micro-batch.

    Args:
        kl_decay: how fast the divergence leaves the loss as the overlap grows, such as 3; 0 is the divergence alone,
            `None` total variation alone, for drafters that have been trained before.
    """

    def __init__(self, kl_decay: float | None = None) -> None:
        _check_kl_decay(kl_decay)
        self.kl_decay = kl_decay

    def __call__(self, steps: Sequence[DraftedTokens], num_steps: int, decay: float) -> DistillationLoss:
        overlaps = [draft_overlap(*step.outcomes) for step in steps]
        values = [1 - overlap for overlap in overlaps]
        if self.kl_decay is not None:
            shares = _kl_shares(overlaps, self.kl_decay)
            divergences = [draft_kl(*step.outcomes) for step in steps]
            values = [torch.lerp(*parts) for parts in zip(values, divergences, shares, strict=True)]
        return distillation_loss(values, [step.weights for step in steps], decay)


class AcceptedLength(DraftLoss):
    """Share of the drafted tokens that are not emitted: what a draft loses from its first rejection on.

    End to end (Bebop, Li et al. 2026, arXiv 2606.12370): 1 less the mean of `prefix_acceptance` over the
    steps of a draft, so that a token counts as much as those before it in its draft are accepted. For drafts of K
    tokens it is 1 - (L - 1) / K with L of `expected_acceptance_length`, where k = V' and the decay is 1.

    Departures: a draft that would run over the end of its response counts with the steps it has (without those the
    last tokens would be learned as last steps alone); with `kl_decay`, lambda * KL of each token is added, lambda as in
    `TotalVariation`: while first steps are rejected, later ones have no gradient of their own.

    Args:
        kl_decay: how fast the divergence leaves the loss of a token as its overlap grows; `None` for the paper's loss,
            for drafters that have been trained before.
    """

    step_decay = 1.0

    def __init__(self, kl_decay: float | None = None) -> None:
        _check_kl_decay(kl_decay)
        self.kl_decay = kl_decay

    def __call__(self, steps: Sequence[DraftedTokens], num_steps: int, decay: float) -> DistillationLoss:
        places = [step.places for step in steps]
        overlaps = _unrolled([draft_overlap(*step.outcomes) for step in steps], places, num_steps)
        drafts = _drafts(
            _unrolled([step.rows for step in steps], places, num_steps), _unrolled(places, places, num_steps)
        )
        values = [1 - emitted for emitted in prefix_acceptance(overlaps, drafts)]
        if self.kl_decay is not None:
            divergences = _unrolled([draft_kl(*step.outcomes) for step in steps], places, num_steps)
            shares = _kl_shares(overlaps, self.kl_decay)
            values = [value + share * kl for value, share, kl in zip(values, shares, divergences, strict=True)]
        return distillation_loss(values, _unrolled([step.weights for step in steps], places, num_steps), decay)


def resolve_draft_loss(loss: str | DraftLoss) -> DraftLoss:
    """The loss of a name, "kl", "tv" or "acceptance"; one that is a loss already stays as it is.

    Raises:
        ValueError: unknown name.

    Example:
        >>> resolve_draft_loss("acceptance").step_decay
        1.0
    """
    losses: dict[str, type[DraftLoss]] = {"kl": ForwardKL, "tv": TotalVariation, "acceptance": AcceptedLength}
    if isinstance(loss, DraftLoss):
        return loss
    if loss not in losses:
        raise ValueError(f"loss must be 'kl', 'tv', 'acceptance' or a DraftLoss by class_path, got {loss!r}")
    return losses[loss]()


def _kl_shares(overlaps: Sequence[Tensor], kl_decay: float) -> list[Tensor]:
    """Lambda of each token: what the divergence counts, the less the more of the token's distribution is right."""
    return [torch.exp(-kl_decay * overlap.detach()) for overlap in overlaps]


def _unrolled(values: Sequence[Tensor], places: Sequence[Tensor], num_steps: int) -> list[Tensor]:
    """By step of the draft, also where a drafter drafts all tokens alike: step s draws from place s + 1 on."""
    later = range(len(values), num_steps)
    return [*values, *(values[-1][(places[-1] > step).to(values[-1].device)] for step in later)]


def _drafts(rows: Sequence[Tensor], places: Sequence[Tensor]) -> list[Tensor]:
    """By step, the number of the draft that each token belongs to: of its row and of the place where it began."""
    width = 1 + max((int(step.max()) for step in places if len(step)), default=0)
    return [row * width + place - step for step, (row, place) in enumerate(zip(rows, places, strict=True))]


def _check_kl_decay(kl_decay: float | None) -> None:
    if kl_decay is not None and kl_decay < 0:
        raise ValueError(f"kl_decay must be 0 or more, got {kl_decay}; use None for no KL divergence")
