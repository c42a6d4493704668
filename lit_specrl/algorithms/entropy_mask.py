"""Learning from those tokens alone at which the policy was undecided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.experience import Experience


@dataclass(frozen=True)
class TopEntropy:
    """Keeps the advantages of the tokens with the highest entropy; those of the others become 0.

    Wang et al. 2025, "Beyond the 80/20 rule" (arXiv 2506.01939); TRL's `top_entropy_quantile`. The average is still
    over all tokens. Departure: TRL takes the quantile of each micro-batch under the policy as it is then. Here it is
    that of the whole step, under the policy that the step began with.

    Args:
        share: of the loss tokens, in (0, 1]; 1 keeps all.

    Raises:
        ValueError: `share` lies outside its range.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"top_entropy_quantile must lie in (0, 1], got {self.share}; 1.0 keeps all tokens")

    @property
    def is_on(self) -> bool:
        """Whether entropies are asked for."""
        return self.share < 1

    def __call__(self, advantages: Tensor, experience: Experience) -> tuple[Tensor, dict[str, float]]:
        """Advantages of the undecided tokens.

        Args:
            advantages: [N, R].
            experience: N rows, with their entropy.

        Returns:
            [N, R], and metrics of all ranks.
        """
        if not self.is_on:
            return advantages, {}
        assert experience.entropy is not None
        threshold = entropy_threshold(experience.entropy, experience.loss_mask, self.share)
        kept = torch.where(experience.entropy >= threshold, advantages, 0)
        return kept, {"entropy_threshold": threshold}


def entropy_threshold(entropy: Tensor, loss_mask: Tensor, share: float) -> float:
    """The entropy that a share of the loss tokens of all ranks reaches.

    Args:
        entropy: [N, R] nats.
        loss_mask: [N, R] bool, of this rank; no token at all gives 0.
        share: in (0, 1].

    Returns:
        Nats, interpolated between tokens.

    Example: the upper half of 1, 2, 3.
        >>> entropy_threshold(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool), 0.5)
        2.0
    """
    found = np.concatenate(gather_objects(entropy[loss_mask].float().cpu().numpy()))
    return float(np.quantile(found, 1 - share)) if len(found) else 0.0
