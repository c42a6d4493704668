"""How undecided the policy is where a drafter has to guess it."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_entropy(top_logprobs: Tensor) -> Tensor:
    """Entropy of the policy at each place, over its k most probable tokens and all others as one outcome.

    A lower bound of the entropy, and the entropy where the k tokens have all of the probability. Acceptance falls as it
    rises (Bebop, Li et al. 2026, arXiv 2606.12370).

    Args:
        top_logprobs: [.., k] nats, under the policy's whole softmax.

    Returns:
        [..] nats.

    Example: two tokens of 0.25 and a rest of 0.5: 2 * 0.25 ln 4 + 0.5 ln 2

        >>> policy_entropy(torch.tensor([[0.25, 0.25]]).log())
        tensor([1.0397])
    """
    probs = top_logprobs.exp()
    rest = (1 - probs.sum(-1)).clamp(min=0)
    return torch.special.entr(probs).sum(-1) + torch.special.entr(rest)
