"""What a step reports, under the names of TRL and verl; the README's table defines each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lit_specrl.losses import ClipStatistics, MismatchStatistics
from lit_specrl.rewards.reward_set import RewardScores
from lit_specrl.types import Rollouts


def completion_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths of the responses, in tokens, and how many were cut at the limit."""
    lengths = [len(ids) for ids in rollouts.response_ids]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(rollouts.truncated) / len(lengths),
    }


def reward_metrics(scores: RewardScores, rewards: Tensor, num_generations: int) -> dict[str, float]:
    """Mean of the total reward and of each function, over the rows it applies to; `reward_std` is the mean over groups.

    Args:
        scores: of N rows.
        rewards: [N] their totals.
        num_generations: rows per group, G.
    """
    groups = rewards.view(-1, num_generations)
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(groups.std(-1, correction=min(1, num_generations - 1)).mean()),
    }
    for name, values in zip(scores.names, scores.values, strict=True):
        applicable = torch.tensor([value for value in values if value is not None])
        if len(applicable):
            metrics[f"rewards/{name}/mean"] = float(applicable.mean())
            metrics[f"rewards/{name}/std"] = float(applicable.std(correction=min(1, len(applicable) - 1)))
    return metrics | scores.metrics | {"rewards/unscored": float(scores.num_unscored)}


@dataclass
class UpdateStatistics:
    """Sums over the tokens of a step's updates; micro-batches and updates are added up."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The micro-batch's share of the loss; shares add up to the loss."""
    entropy_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    kl_sum: Tensor | None = None
    num_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    clipped: ClipStatistics | None = None
    mismatch: MismatchStatistics | None = None
    num_updates: int = 0
    trained_tokens: int = 0
    """Prompt and response tokens of the rows that were computed."""
    computed_tokens: int = 0
    """Tokens that went through the policy for them: shared prompts once, padding included."""
    real_tokens: int = 0
    """The same without padding."""
    rows_without_gradient: int = 0

    def __add__(self, other: UpdateStatistics) -> UpdateStatistics:
        def add(name: str) -> object:
            mine, theirs = getattr(self, name), getattr(other, name)
            return theirs if mine is None else mine if theirs is None else mine + theirs

        return UpdateStatistics(**{entry.name: add(entry.name) for entry in fields(self)})  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        count = self.num_tokens.clamp_min(1)
        metrics = {
            "loss": float(self.loss) / max(1, self.num_updates),
            "entropy": float(self.entropy_sum / count),
            "perf/trained_tokens": float(self.trained_tokens),
            "perf/computed_tokens": float(self.computed_tokens),
            "perf/padding_fraction": 1 - self.real_tokens / max(1, self.computed_tokens),
            "perf/rows_without_gradient": float(self.rows_without_gradient),
        }
        if self.kl_sum is not None:
            metrics["kl"] = float(self.kl_sum / count)
        if self.clipped is not None:
            metrics |= {
                "clip_ratio/low_mean": float(self.clipped.low_mean),
                "clip_ratio/high_mean": float(self.clipped.high_mean),
                "clip_ratio/region_mean": float(self.clipped.region_mean),
            }
        if self.mismatch is not None and int(self.mismatch.difference_count):
            metrics |= {
                "sampling/importance_sampling_ratio/min": float(self.mismatch.ratio_min),
                "sampling/importance_sampling_ratio/mean": float(self.mismatch.ratio_mean),
                "sampling/importance_sampling_ratio/max": float(self.mismatch.ratio_max),
                "sampling/sampling_logp_difference/mean": float(self.mismatch.difference_mean),
                "sampling/sampling_logp_difference/max": float(self.mismatch.difference_max),
            }
        return metrics
