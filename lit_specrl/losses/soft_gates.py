"""Losses that clip nothing: smooth gates in place of the clip (SAPO, VESPO), and the plain policy gradient, alone or
held back by a square (DRO)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_specrl.losses.aggregation import Aggregation
from lit_specrl.losses.policy_loss import ClipStatistics, TokenLoss
from lit_specrl.losses.ratio import MAX_LOG_RATIO, bounded_exp, log_ratio, masked_terms

_LOWEST_LOG_WEIGHT = math.log(1e-8)


class SoftGate(TokenLoss):
    """A loss of the log-ratio of each token that clips nothing."""

    def __call__(
        self, policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, ClipStatistics]:
        policy_logprobs, old_logprobs, advantages = masked_terms(policy_logprobs, old_logprobs, advantages, loss_mask)
        token_log_ratio = log_ratio(policy_logprobs, old_logprobs, loss_mask)
        nothing = torch.zeros((), dtype=torch.long, device=loss_mask.device)
        return self.gated(token_log_ratio, advantages, policy_logprobs), ClipStatistics(
            nothing, nothing, nothing, count=loss_mask.sum()
        )

    @abstractmethod
    def gated(self, token_log_ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        """The loss of each token, [N, R], from what is 0 outside the loss mask.

        Args:
            token_log_ratio: [N, R] log(policy / old), nats, with gradient.
            advantages: [N, R].
            policy_logprobs: [N, R] nats, with gradient.
        """


@dataclass(frozen=True)
class SAPO(SoftGate):
    """`-sigmoid(tau (r - 1)) * 4 / tau * A`: the gradient of a token fades as its ratio r leaves 1.

    Soft Adaptive Policy Optimization (2025, arXiv 2511.20347); TRL's `loss_type="sapo"`.

    Args:
        temperature_pos: tau where A > 0; TRL's `sapo_temperature_pos`.
        temperature_neg: tau elsewhere; larger, so that tokens of negative advantage fade sooner.
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: a temperature is not positive.
    """

    temperature_pos: float = 1.0
    temperature_neg: float = 1.05
    aggregation: Aggregation = "sequence"

    def __post_init__(self) -> None:
        for name in ("temperature_pos", "temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def gated(self, token_log_ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        tau = torch.where(advantages > 0, self.temperature_pos, self.temperature_neg)
        return -torch.sigmoid(tau * (bounded_exp(token_log_ratio) - 1)) * 4 / tau * advantages


@dataclass(frozen=True)
class VESPO(SoftGate):
    """`-phi(w) * A * log(policy)` with `phi(w) = e^lambda * w^k * e^(-lambda w)` and w the ratio of the whole row.

    arXiv 2602.10693; TRL's `loss_type="vespo"`. The weight phi is 1 at w = 1, falls on both sides of k / lambda, and
    has no gradient. w is the product of the row's ratios policy / old, in [1e-8, e^20]. Departure: TRL also multiplies
    the engine's ratios old / sampled into w. Here `importance_sampling` weights each token beside the loss.

    Args:
        k_pos: k where A >= 0; TRL's `vespo_k_pos`.
        lambda_pos: lambda there.
        k_neg: k elsewhere.
        lambda_neg: lambda there.
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: a number is negative.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def gated(self, token_log_ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        row_log_ratio = token_log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).sum(-1, keepdim=True)  # [N, 1]
        return -self.weight(row_log_ratio, advantages) * advantages * policy_logprobs

    def weight(self, row_log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """phi of each token, [N, R].

        Args:
            row_log_ratio: [N, 1] nats.
            advantages: [N, R].
        """
        log_w = row_log_ratio.clamp(_LOWEST_LOG_WEIGHT, MAX_LOG_RATIO)
        k = torch.where(advantages >= 0, self.k_pos, self.k_neg)
        rate = torch.where(advantages >= 0, self.lambda_pos, self.lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp()


@dataclass(frozen=True)
class PolicyGradient(SoftGate):
    """`-A * log(policy)`: the plain policy gradient, which trusts that the step is small.

    REINFORCE (Williams 1992); the loss of GPG (2025, arXiv 2504.02546) and verl's `loss_mode="gpg"`. Goes with one
    update per step: in later ones nothing says that the rows are of an older policy.

    Args:
        aggregation: how tokens are averaged, see `token_weights`.
    """

    aggregation: Aggregation = "token"

    def gated(self, token_log_ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        return -advantages * policy_logprobs


@dataclass(frozen=True)
class DRO(SoftGate):
    """`-(A * log(policy) - beta / 2 * log(r)^2)`: the plain policy gradient, held back by the square of the log-ratio.

    Direct Reward Optimization (Richemond et al. 2024, arXiv 2405.19107); verl's `loss_mode="dro"`, `dro_beta`.

    Args:
        beta: weight of the square.
        aggregation: how tokens are averaged, see `token_weights`.

    Raises:
        ValueError: `beta` is not positive.
    """

    needs_every_row = True

    beta: float
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def gated(self, token_log_ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor) -> Tensor:
        return -advantages * policy_logprobs + self.beta / 2 * token_log_ratio.square()
