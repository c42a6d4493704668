"""The log of a probability ratio, token by token, safe to exponentiate."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Exponents beyond this are cut, as in verl: exp(20) is 5e8, far from any usable ratio; exp(89) overflows float32."""


def at_least_float32(values: Tensor) -> Tensor:
    """Widen bf16 and float16, whose 8 or 11 bits would round a ratio near 1 to 1; leave float32 and float64 alone."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_ratio(numerator_logprobs: Tensor, denominator_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(numerator / denominator) of each token, in float32 or wider, 0 where `mask` is False.

    Filling before exponentiating keeps garbage on padding from reaching the gradient: 0 * inf is NaN.

    Args:
        numerator_logprobs: [N, R] nats.
        denominator_logprobs: [N, R] nats.
        mask: [N, R] bool, True on tokens that count.

    Returns:
        [N, R] nats.
    """
    return (at_least_float32(numerator_logprobs) - at_least_float32(denominator_logprobs)).masked_fill(~mask, 0)


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, with the exponent held within ±`MAX_LOG_RATIO`; beyond, the gradient is 0."""
    return exponent.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def masked_terms(
    policy_logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss is made of, in float32 or wider, with policy and advantages 0 where `mask` is False.

    Args:
        policy_logprobs: [N, R] nats, with gradient.
        old_logprobs: [N, R] nats; `None` for those of the policy itself.
        advantages: [N, R].
        mask: [N, R] bool, True on tokens that count.

    Returns:
        Log-probs of the policy, old log-probs without gradient, and advantages, each [N, R].
    """
    policy_logprobs = at_least_float32(policy_logprobs).masked_fill(~mask, 0)
    old_logprobs = policy_logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    return policy_logprobs, old_logprobs, at_least_float32(advantages).masked_fill(~mask, 0)
