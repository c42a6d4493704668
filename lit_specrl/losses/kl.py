"""Estimators of the divergence from a reference policy, one number per sampled token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_specrl.losses.ratio import MAX_LOG_RATIO, log_ratio

KLEstimator = Literal[
    "k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+"
]


def kl_penalty(
    policy_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: KLEstimator = "k3"
) -> Tensor:
    """Estimate KL(policy || reference) from each token's own two log-probs.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), with d = reference - policy, in nats:

    | estimator | verl's name | value | as a value | as a loss term |
    |---|---|---|---|---|
    | k1 | kl | -d | unbiased, noisy | its expected gradient is 0 |
    | abs | abs | abs(d) | not an estimator of KL | - |
    | k2 | mse | d^2 / 2 | biased, little noise | expected gradient is that of KL |
    | k3 | low_var_kl | exp(d) - d - 1 | unbiased, never negative | gradient, on average: of KL(reference, policy) |

    k3 is GRPO's (Shao et al. 2024, arXiv 2402.03300, equation 4) and TRL's. A "+" behind any name (verl's
    straight-through variants) keeps the value and takes the gradient of k2.

    k3 follows TRL where verl clamps it to [-10, 10]: that clamp begins to act when the policy gives a token 13 times
    less probability than the reference, and removes the gradient just there. Only exponents beyond 20 are cut, with
    gradient 0.

    Args:
        policy_logprobs: [N, R] nats, with gradient if the estimate is to be a loss.
        reference_logprobs: [N, R] nats.
        mask: [N, R] bool, True on tokens that count.
        estimator: a name of the table.

    Returns:
        [N, R] nats in float32 or wider, 0 outside the mask.

    Raises:
        ValueError: unknown `estimator`.

    Example:
        >>> import torch
        >>> policy, reference = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.5, 0.25]]))
        >>> kl_penalty(policy, reference, torch.ones(1, 2, dtype=torch.bool))
        tensor([[0.0000, 0.1931]])
    """
    d = log_ratio(reference_logprobs.detach(), policy_logprobs, mask)  # [N, R]
    value = _value(d, estimator.removesuffix("+"))
    if not estimator.endswith("+"):
        return value
    gradient_carrier = 0.5 * d.square()
    return value.detach() + gradient_carrier - gradient_carrier.detach()


def _value(d: Tensor, estimator: str) -> Tensor:
    if estimator in ("k1", "kl"):
        return -d
    if estimator == "abs":
        return d.abs()
    if estimator in ("k2", "mse"):
        return 0.5 * d.square()
    if estimator in ("k3", "low_var_kl"):
        # Both terms: with the exponential alone cut off, -d remains and pushes the policy away from the reference.
        d = d.clamp(max=MAX_LOG_RATIO)
        return d.expm1() - d
    raise ValueError(
        f"estimator must be k1, kl, abs, k2, mse, k3 or low_var_kl, with or without '+', got {estimator!r}"
    )
