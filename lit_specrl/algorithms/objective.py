"""What each response token costs the policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_specrl.algorithms.entropy_bonus import EntropyCoefficient
from lit_specrl.experience import Experience
from lit_specrl.losses import ImportanceSampling, KLPenalty, TokenLoss, kl_penalty
from lit_specrl.losses.ratio import bounded_exp, log_ratio
from lit_specrl.masking import masked_mean, masked_sum
from lit_specrl.metrics import UpdateStatistics
from lit_specrl.models.policy import TokenStatistics


@dataclass(frozen=True)
class Objective:
    """Clipped surrogate, corrected for the engine's rounding, plus KL penalty, minus entropy bonus.

    Args:
        policy_loss: the surrogate.
        importance_sampling: correction of the difference between the engine's and the policy's log-probs; `None` for
            none.
        kl: how the penalty is taken.
        entropy: weight of the entropy of each token's distribution; positive keeps the policy diverse.
        off_policy_mask_threshold: most nats per token, in the mean of a row, that the policy may have moved away from
            what sampled it; a row of negative advantage beyond it is left out of the surrogate (DeepSeek-V3.2, 2025,
            arXiv 2512.02556, and TRL). `None` leaves out none.

    Raises:
        ValueError: `off_policy_mask_threshold` is negative.
    """

    policy_loss: TokenLoss
    importance_sampling: ImportanceSampling | None
    kl: KLPenalty
    entropy: EntropyCoefficient
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.off_policy_mask_threshold is not None and not self.off_policy_mask_threshold >= 0:
            raise ValueError(
                f"off_policy_mask_threshold must not be negative, got {self.off_policy_mask_threshold}; leave it out to"
                " leave out no row"
            )

    def __call__(
        self, statistics: TokenStatistics, part: Experience, kl_coef: float
    ) -> tuple[Tensor, UpdateStatistics]:
        """Loss of each token.

        Args:
            statistics: of the policy that is being trained, [n, R] with gradient.
            part: its n rows.
            kl_coef: weight of the KL penalty.

        Returns:
            [n, R], to be summed with `token_weights`; and what to report.
        """
        logprobs, mask = statistics.logprobs, part.loss_mask
        per_token_loss, clipped = self.policy_loss(logprobs, part.old_logprobs, part.advantages, mask)  # [n, R]
        if self.off_policy_mask_threshold is not None:
            kept = is_on_policy(logprobs.detach(), part, self.off_policy_mask_threshold)
            per_token_loss = per_token_loss * kept
        old_logprobs = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        # without a correction the ratios are still reported
        correction, mismatch = (self.importance_sampling or ImportanceSampling())(
            old_logprobs, part.sampling_logprobs, mask
        )
        if self.importance_sampling is not None:
            per_token_loss = per_token_loss * correction
        kl_sum = None
        if part.reference_logprobs is not None:
            kl = kl_penalty(logprobs, part.reference_logprobs, mask, self.kl.estimator)  # [n, R]
            kl_sum = masked_sum(kl.detach(), mask)
            if self.kl.bias_correction:
                kl = kl * bounded_exp(log_ratio(logprobs, old_logprobs, mask))
            if kl_coef:
                per_token_loss = per_token_loss + kl_coef * kl
        if self.entropy.value:
            per_token_loss = per_token_loss - self.entropy.value * statistics.entropy * mask
        return per_token_loss, UpdateStatistics(
            entropy_sum=masked_sum(statistics.entropy.detach(), mask),
            kl_sum=kl_sum,
            num_tokens=mask.sum(),
            clipped=clipped,
            mismatch=mismatch,
        )


def is_on_policy(logprobs: Tensor, part: Experience, threshold: float) -> Tensor:
    """Tokens that `Objective(off_policy_mask_threshold)` keeps.

    Args:
        logprobs: [n, R] nats, of the policy that is being trained.
        part: its n rows.
        threshold: nats per token.

    Returns:
        [n, R] bool.
    """
    old_logprobs = logprobs if part.old_logprobs is None else part.old_logprobs
    # the engine gives none of tokens that it did not sample, such as reused ones
    sampled = torch.where(part.sampling_logprobs.isnan(), old_logprobs, part.sampling_logprobs)
    distance = masked_mean(sampled - logprobs, part.loss_mask, dim=-1, keepdim=True)  # [n, 1]
    return (part.advantages >= 0) | (distance <= threshold)
