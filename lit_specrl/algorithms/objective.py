"""What each response token costs the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lit_specrl.experience import Experience
from lit_specrl.losses import ImportanceSampling, KLEstimator, TokenLoss, kl_penalty
from lit_specrl.masking import masked_sum
from lit_specrl.metrics import UpdateStatistics
from lit_specrl.models.policy import TokenStatistics


@dataclass(frozen=True)
class Objective:
    """Clipped surrogate, corrected for the engine's rounding, plus KL penalty, minus entropy bonus.

    Args:
        policy_loss: the surrogate.
        importance_sampling: correction of the difference between the engine's and the policy's log-probs; `None` for
            none.
        kl_estimator: of the penalty.
        entropy_coef: weight of the entropy of each token's distribution; positive keeps the policy diverse.

    Raises:
        ValueError: `entropy_coef` is not finite.
    """

    policy_loss: TokenLoss
    importance_sampling: ImportanceSampling | None
    kl_estimator: KLEstimator
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be a finite number, got {self.entropy_coef}; use 0.0 for no bonus")

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
        old_logprobs = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        # without a correction the ratios are still reported
        correction, mismatch = (self.importance_sampling or ImportanceSampling())(
            old_logprobs, part.sampling_logprobs, mask
        )
        if self.importance_sampling is not None:
            per_token_loss = per_token_loss * correction
        kl_sum = None
        if part.reference_logprobs is not None:
            kl = kl_penalty(logprobs, part.reference_logprobs, mask, self.kl_estimator)  # [n, R]
            kl_sum = masked_sum(kl.detach(), mask)
            if kl_coef:
                per_token_loss = per_token_loss + kl_coef * kl
        if self.entropy_coef:
            per_token_loss = per_token_loss - self.entropy_coef * statistics.entropy * mask
        return per_token_loss, UpdateStatistics(
            entropy_sum=masked_sum(statistics.entropy.detach(), mask),
            kl_sum=kl_sum,
            num_tokens=mask.sum(),
            clipped=clipped,
            mismatch=mismatch,
        )
