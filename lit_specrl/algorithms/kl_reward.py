"""A KL penalty that is taken from the reward."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_specrl.distributed.collectives import sum_over_ranks
from lit_specrl.experience import Experience
from lit_specrl.losses import KLCoefficient, KLEstimator, kl_penalty
from lit_specrl.masking import masked_mean


def kl_in_reward(
    experience: Experience, coefficient: KLCoefficient, estimator: KLEstimator
) -> tuple[Tensor, dict[str, float]]:
    """What each token's departure from the initial policy costs in reward; adapts the coefficient.

    Args:
        experience: N rows with old and reference log-probs.
        coefficient: weight of the penalty.
        estimator: of the KL.

    Returns:
        [N, R] to be subtracted from the rewards, and metrics.
    """
    assert experience.old_logprobs is not None and experience.reference_logprobs is not None
    mask = experience.policy_mask
    kl = kl_penalty(experience.old_logprobs, experience.reference_logprobs, mask, estimator)
    penalty = coefficient.value * kl
    num_rows = sum_over_ranks(torch.tensor(experience.num_rows, device=mask.device))
    mean_kl = sum_over_ranks(masked_mean(kl, mask, dim=-1).sum()) / num_rows
    metrics = {"actor/reward_kl_penalty": float(mean_kl), "actor/reward_kl_penalty_coeff": coefficient.value}
    coefficient.update(float(mean_kl), int(num_rows))
    return penalty, metrics
