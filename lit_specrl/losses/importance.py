"""Weights that correct for an engine whose probabilities are not quite the trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_specrl.losses.ratio import bounded_exp, log_ratio
from lit_specrl.masking import masked_sum

ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class MismatchStatistics:
    """How far the engine was off, as sums and extremes; add those of several micro-batches or ranks.

    Of nothing, the means are 0, minima are +inf, maxima of ratios -inf.
    """

    ratio_min: Tensor
    """TRL's `sampling/importance_sampling_ratio/min`, over the weights applied."""
    ratio_max: Tensor
    """TRL's `sampling/importance_sampling_ratio/max`."""
    ratio_sum: Tensor
    ratio_count: Tensor
    """Loss tokens, or rows (also those without loss tokens, as in TRL) in the sequence modes."""
    difference_max: Tensor
    """TRL's `sampling/sampling_logp_difference/max`, nats."""
    difference_sum: Tensor
    """Of abs(old - sampling), nats."""
    difference_count: Tensor
    """Loss tokens with a known sampling log-prob."""

    def __add__(self, other: MismatchStatistics) -> MismatchStatistics:
        return MismatchStatistics(
            ratio_min=torch.minimum(self.ratio_min, other.ratio_min),
            ratio_max=torch.maximum(self.ratio_max, other.ratio_max),
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_count=self.ratio_count + other.ratio_count,
            difference_max=torch.maximum(self.difference_max, other.difference_max),
            difference_sum=self.difference_sum + other.difference_sum,
            difference_count=self.difference_count + other.difference_count,
        )

    @property
    def ratio_mean(self) -> Tensor:
        """TRL's `sampling/importance_sampling_ratio/mean`."""
        return self.ratio_sum / self.ratio_count.clamp(min=1)

    @property
    def difference_mean(self) -> Tensor:
        """TRL's `sampling/sampling_logp_difference/mean`, nats."""
        return self.difference_sum / self.difference_count.clamp(min=1)


@dataclass(frozen=True)
class ImportanceSampling:
    """Weight each token's loss by trainer probability over engine probability, kept within bounds.

    Truncated importance sampling (Ionides 2008; for language models Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training") by token, and masking of whole sequences (Liu et al. 2025, "When
    speed kills stability"). Modes and defaults are TRL's `vllm_importance_sampling_*`:

    | mode | ratio | outside the bounds | in verl |
    |---|---|---|---|
    | token_truncate | of the token | set to the bound | `rollout_is="token"`, threshold 2.0 |
    | token_mask | of the token | weight 0 | `rollout_is="token"`, threshold "lower_upper" (IcePop) |
    | sequence_truncate | product over the row | set to the bound | `rollout_is="sequence"`, threshold 2.0 |
    | sequence_mask | product over the row | weight 0 | `rollout_is="sequence"`, threshold "lower_upper" |

    The correction is approximate: bounding a weight biases it, and under top_p < 1 or top_k the engine's log-probs
    belong to a distribution without tails, so the ratio is biased besides. Where the engine's log-prob is NaN
    (unknown) the token's ratio is 1, as in TRL.

    Args:
        mode: a row of the table.
        clip_max: upper bound of the ratio; `None` for none.
        clip_min: lower bound of the ratio; `None` for none.

    Raises:
        ValueError: unknown `mode`, or bounds out of order.

    Example:
        >>> old_logprobs, sampling_logprobs = torch.tensor([[0.5, 0.8]]).log(), torch.tensor([[0.5, 0.2]]).log()
        >>> loss_mask = torch.ones(1, 2, dtype=torch.bool)
        >>> weights, _ = ImportanceSampling("token_truncate")(old_logprobs, sampling_logprobs, loss_mask)
        >>> weights
        tensor([[1., 3.]])
    """

    mode: ImportanceSamplingMode = "sequence_mask"
    clip_max: float | None = 3.0
    clip_min: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.clip_max is not None and self.clip_max <= 0:
            raise ValueError(f"clip_max must be positive, got {self.clip_max}; leave it out for no upper bound")
        if self.clip_min is not None and self.clip_max is not None and self.clip_min > self.clip_max:
            raise ValueError(f"clip_min must not exceed clip_max, got {self.clip_min} > {self.clip_max}")

    def __call__(
        self, old_logprobs: Tensor, sampling_logprobs: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, MismatchStatistics]:
        """Compute the weights.

        Args:
            old_logprobs: [N, R] nats, of the weights that sampled, evaluated by the trainer.
            sampling_logprobs: [N, R] nats, recorded by the engine; NaN where it gave none.
            loss_mask: [N, R] bool, True on tokens that take part in the loss.

        Returns:
            Weights [N, R] without gradient, 0 outside the mask, and how far the engine was off.
        """
        difference = log_ratio(old_logprobs.detach(), sampling_logprobs.detach(), loss_mask)  # [N, R]
        known_mask = loss_mask & ~difference.isnan()
        difference = difference.masked_fill(~known_mask, 0)
        by_token = self.mode.startswith("token")
        ratio = self._bounded(
            bounded_exp(difference if by_token else difference.sum(-1, keepdim=True))
        )  # [N, R] or [N, 1]
        weights = ratio.expand_as(difference).masked_fill(~loss_mask, 0)  # [N, R]
        counted_mask = loss_mask if by_token else torch.ones_like(ratio, dtype=torch.bool)
        return weights, _statistics(ratio, counted_mask, difference.abs(), known_mask)

    def _bounded(self, ratio: Tensor) -> Tensor:
        lower = 0.0 if self.clip_min is None else self.clip_min
        upper = torch.inf if self.clip_max is None else self.clip_max
        if self.mode.endswith("truncate"):
            return ratio.clamp(lower, upper)
        return ratio.masked_fill((ratio < lower) | (ratio > upper), 0)


def _statistics(ratios: Tensor, counted_mask: Tensor, differences: Tensor, known_mask: Tensor) -> MismatchStatistics:
    infinity = ratios.new_full((1,), torch.inf)
    return MismatchStatistics(
        # not ratios[counted_mask], whose size the host would have to ask the device for
        ratio_min=torch.cat([ratios.masked_fill(~counted_mask, torch.inf).flatten(), infinity]).min(),
        ratio_max=torch.cat([ratios.masked_fill(~counted_mask, -torch.inf).flatten(), -infinity]).max(),
        ratio_sum=masked_sum(ratios, counted_mask),
        ratio_count=counted_mask.sum(),
        difference_max=torch.cat([differences.flatten(), differences.new_zeros(1)]).max(),
        difference_sum=masked_sum(differences, known_mask),
        difference_count=known_mask.sum(),
    )
