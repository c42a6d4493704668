"""The names of published losses, resolved into their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lit_specrl.losses.aggregation import Aggregation
from lit_specrl.losses.policy_loss import ImportanceSamplingLevel, PolicyLoss, Surrogate, TokenLoss
from lit_specrl.losses.soft_gates import SAPO, VESPO, PolicyGradient, SoftGate
from lit_specrl.losses.trust_regions import DPPO, GMPO, Divergence


class LossType(NamedTuple):
    """What a name like "dapo" stands for: arguments of `PolicyLoss`."""

    surrogate: Surrogate
    importance_sampling_level: ImportanceSamplingLevel
    aggregation: Aggregation


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType("clip", "token", "sequence"),
    "dapo": LossType("clip", "token", "token"),
    "bnpo": LossType("clip", "token", "token"),
    "dr_grpo": LossType("clip", "token", "fixed"),
    "cispo": LossType("cispo", "token", "token"),
    "gspo": LossType("clip", "sequence", "sequence"),
    "luspo": LossType("clip", "sequence", "sequence_sum"),
}
"""TRL's `loss_type` names, and two notes.

"bnpo" in TRL averages over the tokens of each micro-batch, so that its loss depends on how the batch was split. Here
it is an alias of "dapo", which it equals when there is one micro-batch. "gspo" is no `loss_type` in TRL but
`loss_type="grpo"` with `importance_sampling_level="sequence"`.
"""

SOFT_GATES: dict[str, Callable[[], SoftGate]] = {"sapo": SAPO, "vespo": VESPO, "gpg": PolicyGradient}
"""TRL's and verl's names of losses without a clip, with the paper's numbers; others by `class_path`."""

_DIVERGENCES: dict[str, Divergence] = {"dppo_tv": "tv", "dppo_kl": "kl"}
NAMES = (*LOSS_TYPES, *SOFT_GATES, "geo_mean", *_DIVERGENCES)
"""All that `named_loss` knows."""


def resolve_loss_type(name: str) -> LossType:
    """Look a loss up by TRL's name.

    Raises:
        ValueError: unknown name.

    Example:
        >>> resolve_loss_type("dr_grpo").aggregation
        'fixed'
    """
    if name not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(NAMES)}, or a loss by class_path, got {name!r}")
    return LOSS_TYPES[name]


def named_loss(
    name: str,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    clip_ratio_c: float | None = None,
) -> TokenLoss:
    """The loss of a name of `NAMES`; the numbers are those of `PolicyLoss`, `GMPO` ("geo_mean") and `DPPO`.

    Raises:
        ValueError: unknown name, a number out of its range, or a bound that the loss has not.

    Example:
        >>> named_loss("gspo", epsilon=3e-4)  # doctest: +ELLIPSIS
        PolicyLoss(epsilon=0.0003, ..., importance_sampling_level='sequence', surrogate='clip', aggregation='sequence')
    """
    if name in _DIVERGENCES:
        _refuse(name, delta=delta)
        largest_weight = DPPO.clip_ratio_c if clip_ratio_c is None else clip_ratio_c
        return DPPO(_DIVERGENCES[name], epsilon, epsilon_high, largest_weight)
    if name == "geo_mean":
        _refuse(name, delta=delta, clip_ratio_c=clip_ratio_c)
        return GMPO(epsilon, epsilon_high)
    if name in SOFT_GATES:
        _refuse(name, delta=delta, clip_ratio_c=clip_ratio_c)
        return SOFT_GATES[name]()
    parts = resolve_loss_type(name)
    return PolicyLoss(
        epsilon,
        epsilon_high,
        delta,
        clip_ratio_c,
        importance_sampling_level=parts.importance_sampling_level,
        surrogate=parts.surrogate,
        aggregation=parts.aggregation,
    )


def _refuse(name: str, **bounds: float | None) -> None:
    given = " and ".join(bound for bound, value in bounds.items() if value is not None)
    if given:
        raise ValueError(f"{given} bounds a clipped ratio; loss_type={name!r} has none, leave it out")
