"""The weight of a KL penalty, constant or following a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from lit_specrl.losses.kl import KLEstimator


@dataclass(frozen=True)
class KLPenalty:
    """How a KL penalty towards the initial policy, or one that follows, is taken; its weight is `beta`.

    Args:
        estimator: "k1", "k2", "k3" (Schulman 2020) or another name of `kl_penalty`.
        in_reward: subtract the penalty from the rewards, token by token, instead of adding it to the loss.
        target: KL, in nats per token, that `beta` is adapted to hold; `None` keeps it. Needs `in_reward`.
        horizon: rows over which `beta` adapts.
        sync_steps: training steps after which the reference moves towards the policy; `None` keeps it as it began.
            TRL's `ref_model_sync_steps`; 1 with a small `mixup_alpha` is an exponential moving average.
        mixup_alpha: share of the policy's weights in the moved reference (TRL's `ref_model_mixup_alpha`; Gorbatovski
            et al. 2024, arXiv 2404.09656); 1 copies the policy.
        bias_correction: multiply the penalty in the loss by the token's probability ratio, with its gradient. The
            gradient of k3 is then that of the divergence, without bias (DeepSeek-V3.2, 2025, arXiv 2512.02556; TRL's
            `use_bias_correction_kl`).

    Raises:
        ValueError: an unknown estimator, a target of a penalty in the loss, a correction of one in the reward, or a
            number out of its range.
    """

    estimator: KLEstimator = "k3"
    in_reward: bool = False
    target: float | None = None
    horizon: int = 10_000
    sync_steps: int | None = None
    mixup_alpha: float = 0.6
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in get_args(KLEstimator):
            raise ValueError(
                f"the KL estimator must be one of {', '.join(get_args(KLEstimator))}, got {self.estimator!r}"
            )
        if self.target is not None and not self.in_reward:
            raise ValueError(f"target={self.target} adapts a KL penalty in the reward; set in_reward=True")
        if self.bias_correction and self.in_reward:
            raise ValueError("bias_correction mends the gradient of a penalty in the loss; leave it or in_reward out")
        if self.sync_steps is not None and self.sync_steps < 1:
            raise ValueError(
                f"sync_steps must be at least 1, got {self.sync_steps}; leave it out for a fixed reference"
            )
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(f"mixup_alpha must lie in (0, 1], got {self.mixup_alpha}")


class KLCoefficient:
    """Weight of the KL penalty; with a target it grows while the KL exceeds it and falls while it does not.

    Ziegler et al. 2019 ("Fine-tuning language models from human preferences", arXiv 1909.08593, section 2.2):
    `coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * rows / horizon`. As in verl, `kl` is the mean over rows of
    the row's mean per token, not the sum over tokens as in the paper. One update at most halves the weight.

    Args:
        value: weight at the beginning.
        target: KL to hold, in nats per token; `None` keeps the weight.
        horizon: rows after which a KL of twice the target has moved the weight by about a fifth.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> coefficient = KLCoefficient(0.1, target=0.02, horizon=100)
        >>> coefficient.update(kl=0.08, num_rows=50)
        >>> round(coefficient.value, 6)
        0.11
    """

    def __init__(self, value: float, target: float | None = None, horizon: int = 10_000) -> None:
        if value < 0:
            raise ValueError(f"beta must not be negative, got {value}; 0 switches the KL penalty off")
        if target is not None and target <= 0:
            raise ValueError(f"the KL target must be positive, got {target}; leave it out for a constant beta")
        if target is not None and value == 0:
            raise ValueError(f"the KL target {target} needs a positive beta to begin with, got 0")
        if horizon < 1:
            raise ValueError(f"the KL horizon must be at least 1 row, got {horizon}")
        self.value = value
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_rows: int) -> None:
        """Move the weight.

        Args:
            kl: of the rows just seen, in nats per token.
            num_rows: how many they were, on all ranks.
        """
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            # verl lets the product reach 0, from which no weight comes back, where a step has 5 times the horizon's
            # rows
            self.value *= max(1 + error * num_rows / self.horizon, 0.5)
