"""How much each response counts when the drafter learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.drafting.distillation.buffer import DistillationSample

WeightScope = Literal["group", "batch", "none"]


def reward_weights(
    rewards: Tensor,
    groups: Sequence[int] | Tensor,
    scope: WeightScope = "batch",
    floor: float = 0.1,
    max_weight: float = 4.0,
) -> Tensor:
    """Weights w(r) of mean 1 that let the drafter learn more from responses of high reward.

    ReSpec (Chen et al. 2025, arXiv 2510.26475, reward-weighted knowledge distillation) weighs the loss of a response by
    w(r) = r, "normalised and clipped" without saying how. Here r is rescaled to r' in [0, 1] by the lowest and the
    highest reward of its scope, w = floor + (1 - floor) * r' is divided by its mean over the batch, and what exceeds
    `max_weight` is cut, after which the mean may be below 1.

    We depart from it by the floor: with rewards of 0 and 1 w(r) = r would never train the drafter on a failed response,
    although failures are drafted for as well, and most of all at the start of a run. `floor=0` is ReSpec's w(r) = r,
    `floor=1` or `scope="none"` plain distillation.

    Where all rewards of a scope are equal, its responses count in full. With `scope="group"` that means that a prompt
    which is always failed counts like one which is always solved.

    Args:
        rewards: [N] any number type; NaN, for a response without a reward, counts as the lowest of its scope.
        groups: [N] number of the prompt that each response answers; matters for `scope="group"` only.
        scope: whose rewards r is compared with: those of its "group", of the whole "batch", or none ("none", all
            weights 1).
        floor: weight of the lowest reward before normalisation, as a fraction of that of the highest.
        max_weight: largest weight, at least 1.

    Returns:
        Weights [N], float32, or float64 for rewards of float64. The mean is taken over the rewards handed in, so hand
        in those of all ranks.

    Raises:
        ValueError: unknown `scope`, `floor` outside [0, 1], `max_weight` below 1, infinite rewards, or not one group
            per reward.

    Example: (0.1, 1, 0.1, 1) divided by their mean of 0.55

        >>> reward_weights(torch.tensor([0.0, 1.0, 0.0, 1.0]), groups=[0, 0, 1, 1])
        tensor([0.1818, 1.8182, 0.1818, 1.8182])
    """
    _check(scope, floor, max_weight)
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    groups = torch.as_tensor(groups, device=rewards.device)
    if rewards.dim() != 1 or groups.shape != rewards.shape:
        raise ValueError(
            f"rewards must be [N] and groups must have one entry for each, got {list(rewards.shape)} and "
            f"{list(groups.shape)}"
        )
    if rewards.isinf().any():
        raise ValueError("rewards must be finite or NaN, got an infinite one, which leaves no room between the others")
    if scope == "none":
        return torch.ones_like(rewards)
    rescaled = torch.empty_like(rewards)
    scopes = groups if scope == "group" else torch.zeros_like(groups)
    for member in scopes.unique():
        rows = scopes == member
        rescaled[rows] = _to_unit_interval(rewards[rows])
    weights = floor + (1 - floor) * rescaled
    # the highest of a scope has weight 1, so that the mean is not 0
    return (weights / weights.mean()).clamp(max=max_weight)


def weighted(
    samples: Sequence[DistillationSample], rank: int, scope: WeightScope, floor: float, max_weight: float
) -> list[DistillationSample]:
    """This rank's samples with the weights that the rewards of all ranks give them.

    Args:
        samples: of this rank, maybe none.
        rank: of this process among those that call this together.
        scope: as in `reward_weights`, as are the others.
    """
    found = gather_objects([(sample.uid, sample.reward) for sample in samples])
    everyone = [entry for entries in found for entry in entries]
    if not everyone:
        return []
    numbers = {uid: number for number, uid in enumerate(dict.fromkeys(uid for uid, _ in everyone))}
    rewards = torch.tensor([reward for _, reward in everyone])
    weights = reward_weights(rewards, [numbers[uid] for uid, _ in everyone], scope, floor, max_weight).tolist()
    start = sum(len(entries) for entries in found[:rank])
    own = weights[start : start + len(samples)]
    return [replace(sample, weight=weight) for sample, weight in zip(samples, own, strict=True)]


def _check(scope: str, floor: float, max_weight: float) -> None:
    if scope not in ("group", "batch", "none"):
        raise ValueError(f"scope must be 'group', 'batch' or 'none', got {scope!r}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be between 0 and 1, got {floor}; use 1.0 for plain distillation")
    if not max_weight >= 1:
        raise ValueError(f"max_weight must be at least 1, the mean of the weights, got {max_weight}")


def _to_unit_interval(rewards: Tensor) -> Tensor:
    """Rewards [n] of one scope from 0 (lowest) to 1 (highest); all 1 where they are equal."""
    lowest = rewards.nan_to_num(nan=torch.inf).min()
    rewards = torch.where(rewards.isnan(), lowest, rewards)
    span = rewards.max() - lowest
    if not span > 0:  # NaN where none has a reward
        return torch.ones_like(rewards)
    return (rewards - lowest) / span
