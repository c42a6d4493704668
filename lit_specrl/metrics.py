"""What a step reports, under the names of TRL and verl; the README's table defines each.

Sums and counts travel, over micro-batches, rounds of generation and ranks, and are divided once, at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_specrl.advantages import frac_reward_zero_std
from lit_specrl.distributed.transfer import moved_together
from lit_specrl.losses import ClipStatistics, MismatchStatistics, ValueClipStatistics
from lit_specrl.types import Rollouts

S = TypeVar("S", bound=Any)


def merge(parts: Iterable[S]) -> S:
    """The sum of at least one statistics object; unlike `sum`, it needs no zero to begin with.

    Example:
        >>> merge([[1], [2, 3]])
        [1, 2, 3]
    """
    return reduce(lambda first, second: first + second, parts)


@dataclass(frozen=True)
class TurnStatistics:
    """Counts of rows with an environment."""

    num_rows: int
    num_turns: int
    num_observation_tokens: int
    num_cut_by_length: int
    num_cut_by_turns: int

    @classmethod
    def of(cls, rollouts: Rollouts) -> TurnStatistics:
        return cls(
            num_rows=rollouts.num_rows,
            num_turns=sum(len(episode.turns) for episode in rollouts.episodes),
            num_observation_tokens=sum(episode.num_observation_tokens for episode in rollouts.episodes),
            num_cut_by_length=rollouts.finish_reasons.count("length"),
            num_cut_by_turns=rollouts.finish_reasons.count("turns"),
        )

    def __add__(self, other: TurnStatistics) -> TurnStatistics:
        return TurnStatistics(
            **{entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)}
        )

    def metrics(self) -> dict[str, float]:
        return {
            "environment/turns": self.num_turns / self.num_rows,
            "environment/observation_tokens": self.num_observation_tokens / self.num_rows,
            "environment/cut_by_length": self.num_cut_by_length / self.num_rows,
            "environment/cut_by_turns": self.num_cut_by_turns / self.num_rows,
        }


@dataclass(frozen=True)
class RolloutStatistics:
    """Lengths and rewards of generated rows."""

    num_generations: int
    lengths: tuple[int, ...]
    """Response tokens that the policy said, of each row."""
    num_truncated: int
    num_generated_tokens: int
    """Response tokens that the engine sampled."""
    elapsed_s: float
    """Wall time of generation; of several ranks, added up."""
    total_rewards: tuple[float | None, ...]
    rewards: dict[str, tuple[float | None, ...]]
    counters: dict[str, float]
    """What the rewards count, such as `rewards/math/timeouts`."""
    turns: TurnStatistics | None = None
    """`None` without an environment."""

    @classmethod
    def of(cls, rollouts: Rollouts, counters: dict[str, float]) -> RolloutStatistics:
        return cls(
            num_generations=rollouts.request.sampling.num_generations,
            lengths=tuple(rollouts.policy_lengths),
            num_truncated=sum(rollouts.truncated),
            num_generated_tokens=rollouts.num_generated_tokens,
            elapsed_s=rollouts.elapsed_s,
            total_rewards=tuple(rollouts.total_rewards),
            rewards={name: tuple(values) for name, values in rollouts.rewards.items()},
            counters=counters,
            turns=TurnStatistics.of(rollouts) if rollouts.episodes else None,
        )

    def __add__(self, other: RolloutStatistics) -> RolloutStatistics:
        counters: dict[str, float] = defaultdict(float, self.counters)
        for name, count in other.counters.items():
            counters[name] += count
        return RolloutStatistics(
            num_generations=self.num_generations,
            lengths=self.lengths + other.lengths,
            num_truncated=self.num_truncated + other.num_truncated,
            num_generated_tokens=self.num_generated_tokens + other.num_generated_tokens,
            elapsed_s=self.elapsed_s + other.elapsed_s,
            total_rewards=self.total_rewards + other.total_rewards,
            rewards={name: values + other.rewards[name] for name, values in self.rewards.items()},
            counters=dict(counters),
            turns=None if self.turns is None or other.turns is None else self.turns + other.turns,
        )

    def metrics(self) -> dict[str, float]:
        rewards = torch.tensor([reward or 0.0 for reward in self.total_rewards])  # [N]
        scored = torch.tensor([torch.nan if reward is None else reward for reward in self.total_rewards])
        groups = rewards.view(-1, self.num_generations)
        metrics = {
            "completions/mean_length": sum(self.lengths) / len(self.lengths),
            "completions/min_length": float(min(self.lengths)),
            "completions/max_length": float(max(self.lengths)),
            "completions/clipped_ratio": self.num_truncated / len(self.lengths),
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(-1, correction=min(1, self.num_generations - 1)).mean()),
            "frac_reward_zero_std": float(frac_reward_zero_std(scored, self.num_generations)),
            "rewards/unscored": float(self.total_rewards.count(None)),
        }
        for name, values in self.rewards.items():
            applicable = torch.tensor([value for value in values if value is not None])
            if len(applicable):
                metrics[f"rewards/{name}/mean"] = float(applicable.mean())
                metrics[f"rewards/{name}/std"] = float(applicable.std(correction=min(1, len(applicable) - 1)))
        if self.turns is not None:
            metrics |= self.turns.metrics()
        return metrics | self.counters


@dataclass
class UpdateStatistics:
    """Sums over the tokens of a step's updates; micro-batches, updates and ranks are added up."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The micro-batch's share of the loss; shares add up to the loss."""
    entropy_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    kl_sum: Tensor | None = None
    num_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    clipped: ClipStatistics | None = None
    mismatch: MismatchStatistics | None = None
    num_updates: int = 0
    """Updates of all ranks together."""
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

    def to(self, device: str) -> UpdateStatistics:
        """Copy with every tensor on `device`."""
        return _moved(self, device)

    def metrics(self, num_ranks: int = 1) -> dict[str, float]:
        count = self.num_tokens.clamp_min(1)
        metrics = {
            "loss": float(self.loss) * num_ranks / max(1, self.num_updates),
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
                "actor/pg_clipfrac_lower": float(self.clipped.bound_mean),
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


@dataclass(frozen=True)
class CriticStatistics:
    """Sums over the tokens of the critic's updates."""

    loss_sum: Tensor
    clipped: ValueClipStatistics

    def __add__(self, other: CriticStatistics) -> CriticStatistics:
        return CriticStatistics(self.loss_sum + other.loss_sum, self.clipped + other.clipped)

    def to(self, device: str) -> CriticStatistics:
        """Copy with every tensor on `device`."""
        return _moved(self, device)

    def metrics(self) -> dict[str, float]:
        return {
            "critic/vf_loss": float(self.loss_sum / self.clipped.count.clamp_min(1)),
            "critic/vf_clipfrac": float(self.clipped.clipped_mean),
        }


@dataclass(frozen=True)
class ValueStatistics:
    """Sums over the tokens of a step that tell how well the critic's values explain the returns.

    `critic/vf_explained_var` is verl's: `1 - var(returns - values) / (var(returns) + 1e-5)`, unbiased variances. 1 is
    perfect, 0 no better than a constant, below 0 worse.

    Example:
        >>> returns = torch.tensor([[0.0, 2.0]])
        >>> statistics = ValueStatistics.of(returns / 2, returns, torch.ones(1, 2, dtype=torch.bool))
        >>> round(statistics.metrics()["critic/vf_explained_var"], 4)
        0.75
    """

    sums: Tensor
    """[6] float64: tokens, values, returns, squared returns, errors, squared errors."""

    @classmethod
    def of(cls, values: Tensor, returns: Tensor, mask: Tensor) -> ValueStatistics:
        """Count tokens.

        Args:
            values: [N, R] of the critic, before the update.
            returns: [N, R] its targets.
            mask: [N, R] bool, True on tokens that count.
        """
        values, returns = values[mask].double(), returns[mask].double()
        errors = returns - values
        columns = [torch.ones_like(values), values, returns, returns.square(), errors, errors.square()]
        return cls(torch.stack([column.sum() for column in columns]).cpu())

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(self.sums + other.sums)

    def metrics(self) -> dict[str, float]:
        count, values, returns, squared_returns, errors, squared_errors = self.sums.tolist()
        metrics = {"critic/values/mean": values / max(count, 1), "critic/returns/mean": returns / max(count, 1)}
        if count > 1:
            variance = (squared_returns - returns**2 / count) / (count - 1)
            error_variance = (squared_errors - errors**2 / count) / (count - 1)
            metrics["critic/vf_explained_var"] = 1 - error_variance / (variance + 1e-5)
        return metrics


def _moved(statistics: S, device: str) -> S:
    """Copy with every tensor on `device`, all of them in one copy."""
    arrived = iter(moved_together(list(_tensors_of(statistics)), device))
    return _with_tensors(statistics, arrived)


def _tensors_of(statistics: Any) -> Iterator[Tensor]:
    if isinstance(statistics, Tensor):
        yield statistics
    elif is_dataclass(statistics):
        for entry in fields(statistics):
            yield from _tensors_of(getattr(statistics, entry.name))


def _with_tensors(statistics: Any, tensors: Iterator[Tensor]) -> Any:
    """The statistics with these tensors in place of their own, in the order of `_tensors_of`."""
    if isinstance(statistics, Tensor):
        return next(tensors)
    if is_dataclass(statistics) and not isinstance(statistics, type):
        entries = {entry.name: _with_tensors(getattr(statistics, entry.name), tensors) for entry in fields(statistics)}
        return replace(statistics, **entries)
    return statistics
