"""The critic's loss of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_specrl.losses.ratio import at_least_float32


@dataclass(frozen=True)
class ValueClipStatistics:
    """How often the clipped loss was the larger one, as sums; add, then read the mean."""

    clipped_sum: Tensor
    count: Tensor
    """Loss tokens."""

    def __add__(self, other: ValueClipStatistics) -> ValueClipStatistics:
        return ValueClipStatistics(self.clipped_sum + other.clipped_sum, self.count + other.count)

    @property
    def clipped_mean(self) -> Tensor:
        """verl's `critic/vf_clipfrac`."""
        return self.clipped_sum / self.count.clamp(min=1)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, cliprange_value: float | None = 0.5
) -> tuple[Tensor, ValueClipStatistics]:
    """Half the squared error of the critic, pessimistic about moves beyond a range.

    `max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2`, the value clipping of PPO's reference implementation
    (Dhariwal et al. 2017, OpenAI Baselines; not in the PPO paper), with verl's name and default for c.

    Args:
        values: [N, R] with gradient.
        old_values: [N, R] the critic's estimates when the advantages were computed.
        returns: [N, R] targets.
        loss_mask: [N, R] bool, True on tokens that take part in the loss.
        cliprange_value: c, in units of reward; `None` for the plain squared error.

    Returns:
        The loss per token [N, R], 0 outside the mask, to be summed with `token_weights`; and what was clipped.

    Raises:
        ValueError: `cliprange_value` is not positive.

    Example:
        >>> ones = torch.ones(1, 1)
        >>> # moved from 0 to 2, clipped to 0.5: (0.5 - 3)^2 / 2
        >>> value_loss(2 * ones, 0 * ones, 3 * ones, torch.ones(1, 1, dtype=torch.bool))[0]
        tensor([[3.1250]])
    """
    if cliprange_value is not None and cliprange_value <= 0:
        raise ValueError(f"cliprange_value must be positive, got {cliprange_value}; use None for no clipping")
    values, old_values, returns = (
        at_least_float32(tensor).masked_fill(~loss_mask, 0)
        for tensor in (values, old_values.detach(), returns.detach())
    )
    squared_error = (values - returns).square()  # [N, R]
    clipped_error = squared_error
    if cliprange_value is not None:
        clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        clipped_error = (clipped_values - returns).square()
    clipped = (clipped_error > squared_error) & loss_mask
    return 0.5 * torch.max(squared_error, clipped_error), ValueClipStatistics(clipped.sum(), loss_mask.sum())
