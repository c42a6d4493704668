"""Importance weights of reused tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_LOG_WEIGHT = 20.0  # exp(20) is 5e8, far from any usable weight; exp(89) overflows float32


def reuse_importance_weights(
    target_logprobs: Tensor, draft_logprobs: Tensor, reused_mask: Tensor, lenience: float
) -> Tensor:
    """Weight that makes a token kept by `RatioAcceptance` count as if today's policy had drawn it.

    The weights are right up to a factor per position. A token is drawn from `draft` and kept with probability `min(1,
    lenience * target / draft)`, so a kept token has the distribution

        proposal = min(draft, lenience * target) / A,    A = sum(min(draft, lenience * target))

    and its importance weight is

        target / proposal = A * target / min(draft, lenience * target) = A * max(target / draft, 1 / lenience).

    A, the acceptance rate in that context, would need both whole distributions and is left out. With
    `weight = max(target / draft, 1 / lenience)`:

        sum(proposal * weight * f) = sum(target * f) / A

    for any f, provided that draft > 0 wherever target > 0: what the draft never proposes, no weight brings back. The
    same goes for tokens beyond a `drift_bound`. Reused tokens have a mean weight of 1 / A and fresh ones the weight 1,
    so reused and fresh together estimate `(2 - A)` times the target's expectation: the right direction, with up to
    twice the length. Dividing by the mean weight of the reused tokens removes the factor where A is the same in all
    contexts, and approximately elsewhere. The weight corrects the choice of each token given what precedes it, not the
    probability of the prefix.

    `1 / lenience` bounds the weight from below; that is what the acceptance test does, not a truncation. Above it is
    only kept from overflowing (exp(20)): cap it where variance matters.

    Args:
        target_logprobs: [N, R] nats, under today's policy.
        draft_logprobs: [N, R] nats, under the policy that verified or generated the draft.
        reused_mask: [N, R] bool, True on tokens that were kept.
        lenience: of the rule that kept them.

    Returns:
        Weights [N, R] without gradient, float32 or wider; 1 outside the mask.

    Raises:
        ValueError: `lenience` is not positive; with 0 nothing can have been kept.

    Example:
        >>> target, draft = torch.tensor([[0.6, 0.2, 0.9]]).log(), torch.tensor([[0.2, 0.8, 0.9]]).log()
        >>> reuse_importance_weights(target, draft, torch.tensor([[True, True, False]]), lenience=2.0)
        tensor([[3.0000, 0.5000, 1.0000]])
    """
    if not lenience > 0:
        raise ValueError(f"lenience must be positive where tokens were reused, got {lenience}")
    wide = torch.promote_types(target_logprobs.dtype, torch.float32)
    log_ratio = target_logprobs.detach().to(wide) - draft_logprobs.detach().to(wide)  # [N, R]
    log_weight = log_ratio.clamp(min=-math.log(lenience)).clamp(max=_MAX_LOG_WEIGHT)
    return log_weight.masked_fill(~reused_mask, 0).exp()
