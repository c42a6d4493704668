"""From a gradient to new weights: clip, look whether it is finite, apply or skip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor


class GradientStep:
    """Applies gradients; a non-finite one is skipped and counted, several in a row stop the run.

    Args:
        name: prefix of the metrics, "actor" or "critic".
        max_grad_norm: gradients are scaled down to this norm.
        max_skipped_updates: successive updates with a non-finite gradient after which the run stops.

    Attributes:
        num_skipped: successive updates skipped up to now.
    """

    def __init__(self, name: str, max_grad_norm: float, max_skipped_updates: int) -> None:
        self.name = name
        self.max_grad_norm = max_grad_norm
        self.max_skipped_updates = max_skipped_updates
        self.num_skipped = 0

    def __call__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], step: int
    ) -> tuple[bool, dict[str, float]]:
        """Update the parameters.

        Args:
            optimizer: owns the parameters.
            parameters: hold gradients of all ranks.
            step: number of the training step, for the warning.

        Returns:
            Whether the update was applied, and metrics.

        Raises:
            RuntimeError: too many updates in a row had a non-finite gradient.
        """
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        # the host waits here, once an update, for the device to have computed it
        norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        is_finite = math.isfinite(norm_value)
        if is_finite:
            optimizer.step()
            self.num_skipped = 0
        else:
            optimizer.zero_grad()
            self.num_skipped += 1
            rank_zero_warn(f"step {step}: {self.name} gradient norm is {norm_value}, the update was skipped")
            if self.num_skipped >= self.max_skipped_updates:
                raise RuntimeError(
                    f"{self.num_skipped} successive updates had a non-finite gradient; lower the learning rate, or "
                    "look for rewards and log-probs that are not finite"
                )
        return is_finite, {
            f"{self.name}/grad_norm": norm_value,
            f"{self.name}/skipped_updates": float(self.num_skipped),
        }
