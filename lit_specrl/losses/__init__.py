"""Losses per token, as pure functions of tensors; shapes in `lit_specrl.types`.

One policy update reads::

    per_token_loss, clipped = policy_loss(policy_logprobs, old_logprobs, advantages, loss_mask)
    correction, mismatch = importance_sampling(old_logprobs, sampling_logprobs, loss_mask)
    kl = kl_penalty(policy_logprobs, reference_logprobs, loss_mask)
    weights = token_weights(loss_mask, "token", num_tokens=num_tokens_of_the_step)
    loss = ((per_token_loss * correction + beta * kl) * weights).sum()
"""

from lit_specrl.losses.aggregation import Aggregation, token_weights
from lit_specrl.losses.importance import ImportanceSampling, ImportanceSamplingMode, MismatchStatistics
from lit_specrl.losses.kl import KLEstimator, kl_penalty
from lit_specrl.losses.kl_coefficient import KLCoefficient, KLPenalty
from lit_specrl.losses.loss_types import LOSS_TYPES, NAMES, SOFT_GATES, LossType, named_loss, resolve_loss_type
from lit_specrl.losses.policy_loss import ClipStatistics, ImportanceSamplingLevel, PolicyLoss, Surrogate, TokenLoss
from lit_specrl.losses.soft_gates import DRO, SAPO, VESPO, PolicyGradient
from lit_specrl.losses.trust_regions import DPPO, GMPO
from lit_specrl.losses.value_loss import ValueClipStatistics, value_loss

__all__ = [
    "DPPO",
    "DRO",
    "GMPO",
    "LOSS_TYPES",
    "NAMES",
    "SAPO",
    "SOFT_GATES",
    "VESPO",
    "Aggregation",
    "ClipStatistics",
    "ImportanceSampling",
    "ImportanceSamplingLevel",
    "ImportanceSamplingMode",
    "KLCoefficient",
    "KLEstimator",
    "KLPenalty",
    "LossType",
    "MismatchStatistics",
    "PolicyGradient",
    "PolicyLoss",
    "Surrogate",
    "TokenLoss",
    "ValueClipStatistics",
    "kl_penalty",
    "named_loss",
    "resolve_loss_type",
    "token_weights",
    "value_loss",
]
