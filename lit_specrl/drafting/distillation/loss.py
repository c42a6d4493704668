"""How far the drafter is from the policy: what it is trained on, and how many of its drafts would be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DistillationLoss:
    """A sum and what to divide it by, once, after those of all micro-batches and ranks have been added up."""

    weighted_sum: Tensor
    """Scalar, nats, with gradient."""
    count: float
    """Drafted tokens, those of step s counted decay**s times; depends on shapes alone."""


def draft_kl(logits: Tensor, top_tokens: Tensor, top_logprobs: Tensor, log_mass: Tensor) -> Tensor:
    """Forward KL divergence of the policy to the drafter at each place, over the policy's k most probable tokens.

    The drafter can propose tokens of its vocabulary alone, so the policy is restricted to these and renormalised. Its
    tokens outside the top k count as one outcome, for the drafter as well. This is a lower bound of the full divergence
    (differences within the rest do not count; log sum inequality), and the divergence itself where k = V' or where the
    policy gives nothing to the rest.

    It is the term of a token in ReSpec's distillation (Chen et al. 2025, arXiv 2510.26475): KL(softmax(target logits)
    || drafter). The paper takes the sum over the whole vocabulary; storing k log-probs a token, instead of V', is our
    departure.

    Args:
        logits: [T, V'] of the drafter over its vocabulary, divided by the sampling temperature.
        top_tokens: [T, k] integers, different indices into the draft vocabulary.
        top_logprobs: [T, k] nats, under the policy's whole softmax.
        log_mass: [T] nats, log of the policy's probability of the draft vocabulary; finite.

    Returns:
        [T] nats, differentiable in `logits`; float32, or float64 for logits of float64. Rounding can make it a little
        negative.

    Raises:
        ValueError: shapes do not fit.

    Example: 0.5, 0.25 and 0.25 for the other two together, against equal logits: 0.5 ln 2 - 0.25 ln 2

        >>> draft_kl(torch.zeros(1, 4), torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log(), torch.zeros(1))
        tensor([0.1733])
    """
    _check_shapes(logits, top_tokens, top_logprobs, log_mass)
    previous_logprobs = _outcome_logits(logits, top_tokens).log_softmax(-1)  # [T, k + 1]
    probs = (top_logprobs - log_mass[:, None]).to(previous_logprobs.dtype).exp()  # [T, k]
    if probs.shape[-1] < previous_logprobs.shape[-1]:
        rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
        probs = torch.cat([probs, rest], -1)  # [T, k + 1]
    return (torch.xlogy(probs, probs) - probs * previous_logprobs).sum(-1)  # xlogy: the rest may be 0


def distillation_loss(kl: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> DistillationLoss:
    """Weighted sum of divergences over the steps of a draft, and the number of tokens to divide it by.

    `weighted_sum / count` is ReSpec's reward-weighted loss (Chen et al. 2025, arXiv 2510.26475) per drafted token, over
    the unrolled steps of EAGLE-3 (Li et al. 2025, arXiv 2503.01840), each worth `decay` times the one before. The count
    has no weights in it: they have mean 1 over a batch (`reward_weights`), and dividing by those of a micro-batch would
    undo them where it holds a single response.

    Args:
        kl: per draft step s, [T_s] nats (`draft_kl`); T_s may differ between steps and may be 0.
        weights: per draft step, [T_s], w(r) of the response that the token belongs to.
        decay: weight of a step relative to the one before, from 0 to 1; 0 trains the first step alone.

    Raises:
        ValueError: no step, another number or other shapes of weights, or `decay` outside [0, 1].

    Example: 2 * 0.5 + 1 * 0.25 at the first step, half of 2 * 1.0 at the second; two tokens and half a token

        >>> divergences = [torch.tensor([0.5, 0.25]), torch.tensor([1.0])]
        >>> loss = distillation_loss(divergences, [torch.tensor([2.0, 1.0]), torch.tensor([2.0])], decay=0.5)
        >>> loss
        DistillationLoss(weighted_sum=tensor(2.2500), count=2.5)
        >>> loss.weighted_sum / loss.count
        tensor(0.9000)
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}; use 1.0 for steps of equal weight")
    shapes, weight_shapes = [list(step.shape) for step in kl], [list(step.shape) for step in weights]
    if not shapes or shapes != weight_shapes or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"kl and weights must be [T_s] each for at least one step, got {shapes} and {weight_shapes}")
    sums = [decay**step * (weight * value).sum() for step, (value, weight) in enumerate(zip(kl, weights, strict=True))]
    count = sum(decay**step * len(value) for step, value in enumerate(kl))
    return DistillationLoss(torch.stack(sums).sum(), float(count))


def expected_acceptance(logits: Tensor, top_tokens: Tensor, top_logprobs: Tensor) -> Tensor:
    """Probability that a sampled draft token is accepted: the sum of min(policy, drafter) over the policy's top k.

    Leviathan et al. 2023, arXiv 2211.17192, lemma 3.3 and theorem 3.5. A lower bound, as the tokens outside the top k
    are left out; exact where k = V'. Unlike in `draft_kl` the policy is not renormalised: what it gives to tokens that
    cannot be drafted is lost.

    Args:
        logits: [T, V'] of the drafter over its vocabulary, divided by the sampling temperature.
        top_tokens: [T, k] integers, different indices into the draft vocabulary.
        top_logprobs: [T, k] nats, under the policy's whole softmax.

    Returns:
        [T] between 0 and 1; float32, or float64 for logits of float64.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> expected_acceptance(torch.zeros(1, 4), torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.125]]).log())
        tensor([0.3750])
    """
    _check_shapes(logits, top_tokens, top_logprobs, None)
    previous_logprobs = _outcome_logits(logits, top_tokens).log_softmax(-1)[:, : top_tokens.shape[-1]]  # [T, k]
    return torch.minimum(previous_logprobs, top_logprobs.to(previous_logprobs.dtype)).exp().sum(-1)


def draft_overlap(logits: Tensor, top_tokens: Tensor, top_logprobs: Tensor, log_mass: Tensor) -> Tensor:
    """Sum of min(policy, drafter) over the policy's k most probable tokens and all others as one outcome.

    1 less the total variation distance of the two (Bebop, Li et al. 2026, arXiv 2606.12370), and so the
    probability that a sampled draft token is accepted. That the others are one outcome makes it an upper bound of it,
    as `expected_acceptance` is a lower one: it does not pull the drafter away from tokens that the policy may say, too.
    All three agree where k = V'. As in `expected_acceptance`, and unlike in `draft_kl`, the policy is not renormalised:
    what it gives to tokens that cannot be drafted is lost whatever the drafter does.

    The paper sums over the whole vocabulary; storing k log-probs a token is our departure.

    Args:
        logits: [T, V'] of the drafter over its vocabulary, divided by the sampling temperature.
        top_tokens: [T, k] integers, different indices into the draft vocabulary.
        top_logprobs: [T, k] nats, under the policy's whole softmax.
        log_mass: [T] nats, log of the policy's probability of the draft vocabulary.

    Returns:
        [T] between 0 and 1, differentiable in `logits`; float32, or float64 for logits of float64. The gradient is at
        most the overlap itself, and so vanishes where the two have nothing in common.

    Raises:
        ValueError: shapes do not fit.

    Example: 0.5 and 0.25 of the policy and 0.125 for two others, against equal logits: 0.25 + 0.25 + 0.125

        >>> log_mass = torch.tensor([0.875]).log()
        >>> draft_overlap(torch.zeros(1, 4), torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log(), log_mass)
        tensor([0.6250])
    """
    _check_shapes(logits, top_tokens, top_logprobs, log_mass)
    previous_logprobs = _outcome_logits(logits, top_tokens).log_softmax(-1)  # [T, k + 1]
    logprobs = top_logprobs.to(previous_logprobs.dtype)  # [T, k]
    if logprobs.shape[-1] < previous_logprobs.shape[-1]:
        rest = log_mass.to(logprobs.dtype).exp() - logprobs.exp().sum(-1)
        logprobs = torch.cat([logprobs, rest.clamp(min=0).log()[:, None]], -1)  # [T, k + 1]
    return torch.minimum(previous_logprobs, logprobs).exp().sum(-1)


def prefix_acceptance(acceptance: Sequence[Tensor], drafts: Sequence[Tensor]) -> list[Tensor]:
    """Probability that a draft token is emitted: that it and all tokens before it in its draft are accepted.

    The sum over the steps of a draft is the number of its tokens that are accepted on average (`1 +` that is
    `expected_acceptance_length`). Drafts that run into the end of the response have fewer steps than others.

    Args:
        acceptance: per draft step s, [T_s] probability that its token is accepted when all before it are.
        drafts: per draft step, [T_s] integers, ascending: the draft that each token belongs to. Those of a step are
            among those of the step before.

    Returns:
        Per draft step, [T_s].

    Example: two drafts, the second one of a single token

        >>> acceptance = [torch.tensor([0.5, 0.25]), torch.tensor([0.5])]
        >>> prefix_acceptance(acceptance, [torch.tensor([0, 1]), torch.tensor([0])])
        [tensor([0.5000, 0.2500]), tensor([0.2500])]
    """
    prefixes = [acceptance[0]]
    for step in range(1, len(acceptance)):
        goes_on = torch.isin(drafts[step - 1], drafts[step]).to(acceptance[step].device)
        prefixes.append(prefixes[-1][goes_on] * acceptance[step])
    return prefixes


def expected_acceptance_length(acceptance: Sequence[Tensor]) -> Tensor:
    """Tokens per verification of a draft: those accepted, and the one that the policy adds.

    Leviathan et al. 2023, arXiv 2211.17192, equation 1, with a probability for each step instead of the same for all. A
    mean over the T starts, so that those of different batches combine by their T.

    Args:
        acceptance: per draft step, [T] probability that its token is accepted when all before it are; entry t of every
            step belongs to one draft.

    Returns:
        Scalar, tokens; NaN without any draft.

    Raises:
        ValueError: no step, or steps that differ in T.

    Example: the second token is accepted half of the time when the first one is

        >>> expected_acceptance_length([torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5])])
        tensor(2.1250)
    """
    shapes = [list(step.shape) for step in acceptance]
    if not shapes or any(shape != shapes[0] or len(shape) != 1 for shape in shapes):
        raise ValueError(f"acceptance must be [T] each for at least one step, with the same T, got {shapes}")
    return 1 + torch.stack(list(acceptance)).cumprod(0).sum(0).mean()


def _outcome_logits(logits: Tensor, top_tokens: Tensor) -> Tensor:
    """Logits [T, k + 1] of the top tokens and, last, of all others as one outcome; [T, k] where there are no others."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top = logits.gather(-1, top_tokens.long()).to(dtype)  # [T, k]
    if top.shape[-1] == logits.shape[-1]:
        return top
    others = logits.scatter(-1, top_tokens.long(), -torch.inf).to(dtype)  # [T, V'], masked before it grows to float32
    return torch.cat([top, others.logsumexp(-1, keepdim=True)], -1)


def _check_shapes(logits: Tensor, top_tokens: Tensor, top_logprobs: Tensor, log_mass: Tensor | None) -> None:
    """Without this a wrong shape would be broadcast."""
    if logits.dim() == top_tokens.dim() == 2 and top_tokens.shape[-1] <= logits.shape[-1]:
        length, k = len(logits), top_tokens.shape[-1]
        mass_fits = log_mass is None or log_mass.shape == (length,)
        if top_tokens.shape == top_logprobs.shape == (length, k) and mass_fits:
            return
    shapes = [list(tensor.shape) for tensor in (logits, top_tokens, top_logprobs, log_mass) if tensor is not None]
    raise ValueError(
        f"logits must be [T, V'], top_tokens and top_logprobs [T, k] with k up to V', log_mass [T]; got {shapes}"
    )
