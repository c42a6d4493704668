"""Losses that bound the policy otherwise than by the ratio of each token: DPPO and GMPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_specrl.losses.aggregation import Aggregation
from lit_specrl.losses.policy_loss import ClipStatistics, TokenLoss
from lit_specrl.losses.ratio import bounded_exp, log_ratio, masked_terms
from lit_specrl.masking import masked_mean

Divergence = Literal["tv", "kl"]
_TINY = 1e-8


@dataclass(frozen=True)
class DPPO(TokenLoss):
    """`-stop_gradient(min(r, clip_ratio_c)) * A * log(policy)`, 0 where the token has moved too far already.

    arXiv 2602.04879; verl's `loss_mode="dppo_tv"` and `"dppo_kl"`. A ratio punishes rare tokens, whose probability
    hardly moves, and lets frequent ones go far. Here a token counts for nothing where its probability has moved in the
    direction of its advantage by more than a bound: by `policy - old` ("tv"), or by the KL divergence between "this
    token" and "any other" ("kl").

    Args:
        divergence: "tv" or "kl".
        epsilon: bound where A < 0; a probability, or nats.
        epsilon_high: bound where A > 0; `None` means `epsilon`.
        clip_ratio_c: largest weight of a token.
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> policy_logprobs, old_logprobs = torch.tensor([[[0.9, 0.02]], [[0.5, 0.01]]]).log()
        >>> advantages, loss_mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> per_token_loss, clipped = DPPO()(policy_logprobs, old_logprobs, advantages, loss_mask)
        >>> per_token_loss, clipped.high_mean  # 0.4 is too far, 0.01 is not, although its ratio is 2
        (tensor([[0.0000, 7.8240]]), tensor(0.5000))
    """

    divergence: Divergence = "tv"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    clip_ratio_c: float = 20.0
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        if self.divergence not in ("tv", "kl"):
            raise ValueError(f"divergence must be 'tv' or 'kl', got {self.divergence!r}")
        _check_bounds(self.epsilon, self.epsilon_high)
        if not self.clip_ratio_c > 1:
            raise ValueError(f"clip_ratio_c must exceed 1, got {self.clip_ratio_c}")

    def __call__(
        self, policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ClipStatistics]:
        policy_logprobs, old_logprobs, advantages = masked_terms(policy_logprobs, old_logprobs, advantages, loss_mask)
        ratio = bounded_exp(log_ratio(policy_logprobs, old_logprobs, loss_mask)).detach()  # [N, R]
        moved = self._moved(policy_logprobs.detach(), old_logprobs)
        low = (moved < -self.epsilon) & (advantages < 0)
        high = (moved > (self.epsilon if self.epsilon_high is None else self.epsilon_high)) & (advantages > 0)
        per_token_loss = -ratio.clamp(max=self.clip_ratio_c) * advantages * policy_logprobs
        return per_token_loss.masked_fill(low | high, 0), ClipStatistics(
            low_sum=(low & loss_mask).sum(),
            high_sum=(high & loss_mask).sum(),
            bound_sum=((ratio > self.clip_ratio_c) & (advantages < 0)).sum(),
            count=loss_mask.sum(),
        )

    def _moved(self, policy_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        """How far each token went, [N, R]: positive upwards, negative downwards."""
        new, old = policy_logprobs.exp(), old_logprobs.exp()
        if self.divergence == "tv":
            return new - old
        others = (1 - old) * ((1 - old + _TINY) / (1 - new + _TINY)).log()
        return (new - old).sign() * (old * (old_logprobs - policy_logprobs) + others)


@dataclass(frozen=True)
class GMPO(TokenLoss):
    """`-A * exp(mean of clip(log r))` of each row: GRPO with the geometric mean of the ratios in place of their mean.

    Geometric-Mean Policy Optimization (2025, arXiv 2507.20673); verl's `loss_mode="geo_mean"`. One stray token cannot
    carry a row away, so that the clip may be wider. `log r` is clipped on the side to which the advantage pulls.
    Departs from verl where tokens are weighted (`importance_sampling`): each token has its own weight here, there the
    row has the geometric mean of them.

    Args:
        epsilon: how far log r may fall below 0 where A < 0; the paper takes 0.4.
        epsilon_high: how far it may rise above 0 where A > 0; `None` means `epsilon`.
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: a bound is negative.

    Example:
        >>> policy_logprobs, old_logprobs = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.2, -4.5]])
        >>> advantages, loss_mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> GMPO()(policy_logprobs, old_logprobs, advantages, loss_mask)[0]  # -exp((0.2 + 0.4) / 2)
        tensor([[-1.3499, -1.3499]])
    """

    epsilon: float = 0.4
    epsilon_high: float | None = None
    aggregation: Aggregation = "sequence"

    def __post_init__(self) -> None:
        _check_bounds(self.epsilon, self.epsilon_high)

    def __call__(
        self, policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ClipStatistics]:
        policy_logprobs, old_logprobs, advantages = masked_terms(policy_logprobs, old_logprobs, advantages, loss_mask)
        token_log_ratio = log_ratio(policy_logprobs, old_logprobs, loss_mask)  # [N, R]
        highest = self.epsilon if self.epsilon_high is None else self.epsilon_high
        low = (token_log_ratio < -self.epsilon) & (advantages < 0)
        high = (token_log_ratio > highest) & (advantages > 0)
        clipped = token_log_ratio.masked_fill(low, -self.epsilon).masked_fill(high, highest)
        ratio = bounded_exp(masked_mean(clipped, loss_mask, dim=-1, keepdim=True))  # [N, 1]
        nothing = torch.zeros((), dtype=torch.long, device=loss_mask.device)
        return -advantages * ratio, ClipStatistics(low.sum(), high.sum(), nothing, count=loss_mask.sum())


def _check_bounds(epsilon: float, epsilon_high: float | None) -> None:
    for name, value in {"epsilon": epsilon, "epsilon_high": epsilon_high}.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
