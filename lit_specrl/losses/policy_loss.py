"""The policy-gradient loss of each token: a probability ratio, clipped, times an advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_specrl.losses.aggregation import Aggregation
from lit_specrl.losses.ratio import bounded_exp, log_ratio, masked_terms
from lit_specrl.masking import masked_mean

Surrogate = Literal["clip", "cispo"]
ImportanceSamplingLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class ClipStatistics:
    """How much was clipped, as sums; add those of several micro-batches or ranks, then read the means.

    One is counted per token, or per row when ratios are taken by sequence (then rows without loss tokens are in
    `count`, as in TRL).
    """

    low_sum: Tensor
    """Ratio below the range, advantage negative."""
    high_sum: Tensor
    """Ratio above the range, advantage positive."""
    bound_sum: Tensor
    """Ratio above `delta` or `clip_ratio_c`, advantage negative; 0 when neither is set."""
    count: Tensor
    """Tokens (or rows) looked at."""

    def __add__(self, other: ClipStatistics) -> ClipStatistics:
        return ClipStatistics(
            low_sum=self.low_sum + other.low_sum,
            high_sum=self.high_sum + other.high_sum,
            bound_sum=self.bound_sum + other.bound_sum,
            count=self.count + other.count,
        )

    @property
    def low_mean(self) -> Tensor:
        """TRL's `clip_ratio/low_mean`."""
        return self.low_sum / self.count.clamp(min=1)

    @property
    def high_mean(self) -> Tensor:
        """TRL's `clip_ratio/high_mean` (`cispo_clip_ratio` for CISPO)."""
        return self.high_sum / self.count.clamp(min=1)

    @property
    def region_mean(self) -> Tensor:
        """TRL's `clip_ratio/region_mean`, verl's `actor/pg_clipfrac`: low or high."""
        return (self.low_sum + self.high_sum) / self.count.clamp(min=1)

    @property
    def bound_mean(self) -> Tensor:
        """verl's `actor/pg_clipfrac_lower`."""
        return self.bound_sum / self.count.clamp(min=1)


class TokenLoss(ABC):
    """What each response token costs the policy: the base of `PolicyLoss` and of losses of your own.

    Example: SAPO (2025, arXiv 2511.20347), a soft gate in place of the clip, in a file of the user::

        @dataclass(frozen=True)
        class SAPO(PolicyLoss):
            tau_positive: float = 1.0
            tau_negative: float = 1.05

            def per_token_loss(self, ratio, advantages, policy_logprobs):
                tau = torch.where(advantages > 0, self.tau_positive, self.tau_negative)
                return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    """

    aggregation: Aggregation
    """How the tokens of a step are averaged, see `token_weights`."""
    needs_every_row: ClassVar[bool] = False
    """Whether rows without advantage have a gradient, too; otherwise they are not computed."""

    @abstractmethod
    def __call__(
        self, policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ClipStatistics]:
        """Compute the loss of each token.

        Args:
            policy_logprobs: [N, R] nats, with gradient.
            old_logprobs: [N, R] nats, of the policy that this step began with; `None` when it is the policy itself.
            advantages: [N, R].
            loss_mask: [N, R] bool, True on tokens that take part in the loss.

        Returns:
            The loss per token [N, R] in float32 or wider, 0 outside the mask, and what was clipped.
        """


@dataclass(frozen=True)
class PolicyLoss(TokenLoss):
    """Loss of each token for PPO, GRPO, DAPO, GSPO and CISPO.

    A subclass that overrides `per_token_loss` is another loss of the same ratios.

    With ratio `r = policy / old` and advantage A, the loss is `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`:
    PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7), the same in GRPO (Shao et al. 2024, arXiv 2402.03300,
    equation 3); a separate `epsilon_high` is DAPO's (Yu et al. 2025, arXiv 2503.14476, section 3.1). How tokens are
    averaged is the other half of these algorithms: see `token_weights`.

    *A bound for negative advantages.* The minimum leaves `-r A` unbounded where A < 0 and r grows. Two known remedies:

    - `delta` replaces r by min(r, delta) before the minimum (INTELLECT-2, 2025, arXiv 2505.07291; TRL). Where A < 0 a
      token costs at most max(delta, 1 + epsilon_high) * abs(A); where A > 0 it is capped by delta, too.
    - `clip_ratio_c` bounds the loss by c * abs(A) where A < 0 and leaves A > 0 untouched (dual clip, Ye et al. 2019,
      arXiv 1912.09729, equation 5; verl).

    They agree when the bound exceeds 1 + epsilon_high, which is how both are meant to be used.

    *Ratios by sequence* (GSPO, Zheng et al. 2025, arXiv 2507.18071). r becomes the geometric mean of the row's
    ratios, over its loss tokens. Implemented as GSPO-token, like verl: the value of the row's ratio, the gradient of
    the token. TRL differentiates the mean itself. Values are the same, and so are gradients while advantage and
    weight are constant along the row.

    *CISPO* (MiniMax 2025, arXiv 2506.13585, equations 4 and 5) is `-stop_gradient(min(r, epsilon_high)) * A *
    log(policy)`. As in TRL, `epsilon_high` is the cap itself (ScaleRL, arXiv 2510.13786, uses 5) and there is no lower
    bound; verl clips to [1 - low, 1 + high].

    Args:
        epsilon: how far the ratio may fall below 1; unused by CISPO.
        epsilon_high: how far it may rise above 1; `None` means `epsilon`. For CISPO the largest weight, and required.
        delta: largest ratio that enters the loss; `None` for no bound.
        clip_ratio_c: largest multiple of abs(A) that a token with negative advantage may cost; `None` for no bound.
        importance_sampling_level: ratios by "token" or by "sequence".
        surrogate: "clip" or "cispo".
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: a bound out of its range, or two that exclude each other.

    Example:
        >>> loss = PolicyLoss(epsilon=0.2, epsilon_high=0.28)
        >>> policy_logprobs, old_logprobs = torch.log(torch.tensor([[0.6, 0.5]])), torch.log(torch.tensor([[0.4, 0.5]]))
        >>> advantages, loss_mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> per_token_loss, clipped = loss(policy_logprobs, old_logprobs, advantages, loss_mask)
        >>> per_token_loss, clipped.high_mean
        (tensor([[-1.2800, -1.0000]]), tensor(0.5000))
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    clip_ratio_c: float | None = None
    importance_sampling_level: ImportanceSamplingLevel = "token"
    surrogate: Surrogate = "clip"
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        if self.surrogate not in ("clip", "cispo"):
            raise ValueError(f"surrogate must be 'clip' or 'cispo', got {self.surrogate!r}")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be 'token' or 'sequence', got {self.importance_sampling_level!r}"
            )
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must lie in [0, 1], got {self.epsilon}")
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise ValueError(f"epsilon_high must not be negative, got {self.epsilon_high}")
        if self.delta is not None and self.clip_ratio_c is not None:
            raise ValueError(
                "delta and clip_ratio_c both bound the loss of negative advantages; set one and leave the other out"
            )
        for name, bound in (("delta", self.delta), ("clip_ratio_c", self.clip_ratio_c)):
            if bound is not None and bound <= 1:
                raise ValueError(f"{name} must exceed 1, got {bound}; leave it out for no bound")
            if bound is not None and self.surrogate == "cispo":
                raise ValueError(f"{name} has no meaning for surrogate='cispo', whose weights end at epsilon_high")
        if self.surrogate == "cispo" and self.epsilon_high is None:
            raise ValueError("surrogate='cispo' needs epsilon_high, the largest weight of a token; 5.0 is usual")

    def __call__(
        self, policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ClipStatistics]:
        policy_logprobs, old_logprobs, advantages = masked_terms(policy_logprobs, old_logprobs, advantages, loss_mask)

        ratio = self._ratio(policy_logprobs, old_logprobs, loss_mask)  # [N, R]
        per_token_loss = self.per_token_loss(ratio, advantages, policy_logprobs)
        return per_token_loss, self._statistics(ratio.detach(), advantages, loss_mask)

    def per_token_loss(self, ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        """The loss of each token, [N, R], from what is 0 outside the loss mask.

        Args:
            ratio: [N, R] policy / old, of the token or of its row, with gradient.
            advantages: [N, R].
            policy_logprobs: [N, R] nats, with gradient.
        """
        if self.surrogate == "cispo":
            return -ratio.detach().clamp(max=self.epsilon_high) * advantages * policy_logprobs
        return self._clipped_surrogate(ratio, advantages)

    @property
    def _highest_ratio(self) -> float:
        if self.surrogate == "cispo":
            assert self.epsilon_high is not None
            return self.epsilon_high
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def _lowest_ratio(self) -> float:
        return 0.0 if self.surrogate == "cispo" else 1 - self.epsilon

    def _ratio(self, policy_logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        token_log_ratio = log_ratio(policy_logprobs, old_logprobs, loss_mask)  # [N, R]
        if self.importance_sampling_level == "token":
            return bounded_exp(token_log_ratio)
        sequence_log_ratio = masked_mean(token_log_ratio.detach(), loss_mask, dim=-1, keepdim=True)  # [N, 1]
        return bounded_exp(sequence_log_ratio + policy_logprobs - policy_logprobs.detach())  # [N, R]

    def _clipped_surrogate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        clipped_ratio = ratio.clamp(self._lowest_ratio, self._highest_ratio)
        if self.delta is not None:
            ratio = ratio.clamp(max=self.delta)
        per_token_loss = torch.max(-ratio * advantages, -clipped_ratio * advantages)
        if self.clip_ratio_c is not None:
            bounded_loss = torch.min(per_token_loss, -self.clip_ratio_c * advantages)
            per_token_loss = torch.where(advantages < 0, bounded_loss, per_token_loss)
        return per_token_loss

    def _statistics(self, ratio: Tensor, advantages: Tensor, loss_mask: Tensor) -> ClipStatistics:
        bound = self.delta if self.clip_ratio_c is None else self.clip_ratio_c
        bounded = ratio > (torch.inf if bound is None else bound)
        return ClipStatistics(
            low_sum=self._count((ratio < self._lowest_ratio) & (advantages < 0), loss_mask),
            high_sum=self._count((ratio > self._highest_ratio) & (advantages > 0), loss_mask),
            bound_sum=self._count(bounded & (advantages < 0), loss_mask),
            count=loss_mask.sum()
            if self.importance_sampling_level == "token"
            else torch.full((), len(loss_mask), dtype=torch.long, device=loss_mask.device),
        )

    def _count(self, clipped: Tensor, loss_mask: Tensor) -> Tensor:
        """Clipped tokens, or rows: of a row all tokens are clipped or none, as long as its advantage is constant."""
        if self.importance_sampling_level == "token":
            return clipped.sum()  # advantages are 0 outside the mask, so nothing is clipped there
        return masked_mean(clipped.float(), loss_mask, dim=-1).sum()
