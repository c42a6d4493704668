"""The names of published losses, resolved into their parts."""

from __future__ import annotations

from typing import NamedTuple

from lit_specrl.losses.aggregation import Aggregation
from lit_specrl.losses.policy_loss import ImportanceSamplingLevel, PolicyLoss, Surrogate, TokenLoss
from lit_specrl.losses.soft_gates import SAPO, VESPO, SoftGate


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

SOFT_GATES: dict[str, type[SoftGate]] = {"sapo": SAPO, "vespo": VESPO}
"""TRL's names of losses without a clip, with the paper's numbers; others by `class_path`."""


def resolve_loss_type(name: str) -> LossType:
    """Look a loss up by TRL's name.

    Raises:
        ValueError: unknown name.

    Example:
        >>> resolve_loss_type("dr_grpo").aggregation
        'fixed'
    """
    if name not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join([*LOSS_TYPES, *SOFT_GATES])}, got {name!r}")
    return LOSS_TYPES[name]


def named_loss(
    name: str,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    clip_ratio_c: float | None = None,
) -> TokenLoss:
    """The loss of a name of `LOSS_TYPES` or `SOFT_GATES`; the numbers are those of `PolicyLoss`.

    Raises:
        ValueError: unknown name, a number out of its range, or a bound that the loss has not.

    Example:
        >>> named_loss("gspo", epsilon=3e-4)  # doctest: +ELLIPSIS
        PolicyLoss(epsilon=0.0003, ..., importance_sampling_level='sequence', surrogate='clip', aggregation='sequence')
    """
    if name in SOFT_GATES:
        if delta is not None or clip_ratio_c is not None:
            raise ValueError(
                f"delta and clip_ratio_c bound a clipped ratio; loss_type={name!r} has none, leave them out"
            )
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
