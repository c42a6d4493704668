"""How much was reused, how old it was, and how it was rewarded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_specrl.prefix_cache.store import CachedRollout

_BLOCK_OVERHEAD = 32  # tokens: the engine begins a block at a block of its KV prefix cache, and with a step of its own


@dataclass(frozen=True)
class ReuseStatistics:
    """Sums over rows; those of several groups, rounds and ranks are added up and divided once."""

    num_rows: int = 0
    num_tokens: int = 0
    """Response tokens of all rows."""
    num_cached: int = 0
    """Rows that had a cached response."""
    num_cached_tokens: int = 0
    num_reused_tokens: int = 0
    num_whole: int = 0
    """Rows that were taken over whole."""
    num_cut: int = 0
    """Rows that took over all that they were offered of a longer response."""
    age_sum: int = 0
    """Steps since the cached responses were stored."""
    num_scored: int = 0
    """Tokens of cached responses that were scored, kept or not."""
    kl_sum: float = 0.0
    """Of exp(d) - d - 1, d = log-prob now - at the last verification, over them, nats; at most 10 each, as in verl."""
    drift_sum: float = 0.0
    """Of abs(log-prob now - when generated) over the reused tokens that were scored, nats."""
    num_pairs: int = 0
    """Groups with scored rows both reused and fresh."""
    gap_sum: float = 0.0
    """Of mean reward of reused rows - mean reward of fresh rows, over them."""

    @classmethod
    def of_group(
        cls,
        step: int,
        cached: Sequence[CachedRollout | None],
        verified_lengths: Sequence[int],
        response_lengths: Sequence[int],
        target_logprobs: Sequence[Tensor | None],
        rewards: Sequence[float | None],
        offered_lengths: Sequence[int] | None = None,
    ) -> ReuseStatistics:
        """Count the G rows of a prompt.

        Args:
            step: training step.
            cached: [G] `None` where a row had none.
            verified_lengths: [G] tokens taken over.
            response_lengths: [G] tokens of the finished responses.
            target_logprobs: [G] log-probs of the cached response under today's policy, NaN behind the block in which it
                was rejected; `None` where they were not needed.
            rewards: [G] total rewards.
            offered_lengths: [G] tokens of the cached response that could be taken over; `None` for all of them.
        """
        offered = offered_lengths or [0 if response is None else len(response) for response in cached]
        scored = [
            (response, length, now.numpy())
            for response, length, now in zip(cached, verified_lengths, target_logprobs, strict=True)
            if response is not None and now is not None
        ]
        drift = _joined(now[:length] - response.generation_logprobs[:length] for response, length, now in scored)
        # Whether a token is scored is decided before it: the mean is the KL with the rejected tokens, not without
        change = _joined(now - response.previous_logprobs[: len(now)] for response, _, now in scored)
        change = change[~np.isnan(change)].clip(-20, 20)
        gap = _reward_gap(cached, rewards)
        return cls(
            num_rows=len(cached),
            num_tokens=sum(response_lengths),
            num_cached=sum(response is not None for response in cached),
            num_cached_tokens=sum(len(response) for response in cached if response is not None),
            num_reused_tokens=sum(verified_lengths),
            num_whole=sum(0 < kept == length for kept, length in zip(verified_lengths, response_lengths, strict=True)),
            num_cut=sum(
                response is not None and 0 < kept == most < min(len(response), length)
                for response, kept, most, length in zip(
                    cached, verified_lengths, offered, response_lengths, strict=True
                )
            ),
            age_sum=sum(step - response.step for response in cached if response is not None),
            num_scored=len(change),
            kl_sum=float((np.expm1(change) - change).clip(max=10).sum()),
            drift_sum=float(np.abs(drift).sum()),
            num_pairs=int(gap is not None),
            gap_sum=gap or 0.0,
        )

    def __add__(self, other: ReuseStatistics) -> ReuseStatistics:
        return ReuseStatistics(
            **{entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)}
        )

    @property
    def kl(self) -> float:
        """Mean over the scored tokens, nats: how far the policy has moved since it last scored them.

        Estimator k3 (Schulman 2020).
        """
        return self.kl_sum / max(1, self.num_scored)

    @property
    def block_length(self) -> int:
        """Tokens to verify at a time, if the next cached responses are rejected as often as these.

        Blocks of b cost (b + c) / (1 - exp(-h b)) tokens until a rejection. Here h is the rate of rejection, and c the
        cost of a block beyond its tokens. The least is near sqrt(2 c / h).
        """
        num_rejected = self.num_cached - self.num_whole - self.num_cut or 0.5  # where there was none, half a one
        rate = num_rejected / max(1, self.num_reused_tokens)
        blocks = math.sqrt(2 * _BLOCK_OVERHEAD / rate) / _BLOCK_OVERHEAD
        return _BLOCK_OVERHEAD * max(1, round(blocks))

    def metrics(self) -> dict[str, float]:
        metrics = {
            "hit_fraction": self.num_cached / max(1, self.num_rows),
            "reuse_fraction": self.num_reused_tokens / max(1, self.num_tokens),
            "full_reuse_fraction": self.num_whole / max(1, self.num_rows),
            "verified_length_mean": self.num_reused_tokens / max(1, self.num_cached),
            "cached_length_mean": self.num_cached_tokens / max(1, self.num_cached),
            "generated_tokens": float(self.num_tokens - self.num_reused_tokens),
            "saved_tokens": float(self.num_reused_tokens),
            "age": self.age_sum / max(1, self.num_cached),
        }
        if self.num_scored:
            metrics |= {"drift": self.drift_sum / max(1, self.num_reused_tokens), "kl": self.kl}
        if self.num_pairs:
            metrics["reward_gap"] = self.gap_sum / self.num_pairs
        return {f"prefix_cache/{name}": value for name, value in metrics.items()}


def _reward_gap(cached: Sequence[CachedRollout | None], rewards: Sequence[float | None]) -> float | None:
    pairs = list(zip(cached, rewards, strict=True))
    reused = [reward for response, reward in pairs if response is not None and reward is not None]
    fresh = [reward for response, reward in pairs if response is None and reward is not None]
    return sum(reused) / len(reused) - sum(fresh) / len(fresh) if reused and fresh else None


def _joined(rows: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """One behind the other, [T], for sums that do not depend on how rows are dealt out."""
    return np.concatenate([np.empty(0), *rows])


def reward_outruns_accuracy(validations: Sequence[tuple[float, float]]) -> bool:
    """Whether training reward rose, and validation accuracy fell, from each of the last three validations to the next.

    Args:
        validations: (mean training reward since the validation before, accuracy), in order.

    Example:
        >>> reward_outruns_accuracy([(0.5, 0.40), (0.6, 0.38), (0.7, 0.35)])
        True
    """
    latest = validations[-3:]
    return len(latest) == 3 and all(
        reward > reward_before and accuracy < accuracy_before
        for (reward_before, accuracy_before), (reward, accuracy) in pairwise(latest)
    )
