"""How much of a cached response may begin today's rollout.

A rule looks at N cached responses (the cached, right-padded to R tokens) and says how many leading tokens of each are
kept: the verified prefix. The policy continues from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class AcceptanceRule(Protocol):
    """Decides how many leading tokens of each draft are kept."""

    @property
    def is_exact(self) -> bool:
        """True when prefix and continuation together are distributed as if the policy had generated both."""

    @property
    def needs_logprobs(self) -> bool:
        """True when the rule looks at log-probs; otherwise the policy need not be run and any values will do."""

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        draft_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        """Lengths of the verified prefixes.

        Args:
            target_logprobs: [N, R] nats, of the draft's tokens under today's policy.
            previous_logprobs: [N, R] nats, what they had when the draft was last verified or generated.
            generation_logprobs: [N, R] nats, what each token had when it was generated.
            draft_mask: [N, R] bool, True on the draft's tokens, which begin in the first column.
            uniforms: [N, R] float32 or float64 in [0, 1), drawn anew for every call.

        Returns:
            Tokens kept of each draft, [N] long; 0 for an empty draft.
        """


@dataclass(frozen=True)
class RatioAcceptance:
    """Keep a draft as far as today's policy would have said it, too, judged token by token or by the whole text so far.

    Not exact: where a draft is cut, generation goes on from the policy, not from the residual that would repair the
    distribution. With `draft` and `target` the distributions of the next token after a kept prefix, and `accept` the
    probability of keeping it, the next token of the rollout is distributed as

        emitted = draft * accept + (1 - sum(draft * accept)) * target

    and after a rejection as `target`.

    *By token* (SPEC-RL), `emitted = min(draft, lenience * target) + (1 - A) * target` with `A = sum(min(draft, lenience *
    target))`, without `drift_bound`. This equals `target` if and only if `min(draft / target, lenience)` is
    the same number for all tokens that the target can emit: for example when target and draft are equal, when the
    lenience is 0, or so small that `lenience * target` nowhere exceeds `draft` (rejection sampling). With a lenience up
    to 1, a continuation from `(target - min(draft, lenience * target)) / (1 - A)` would be exact; with a higher one
    none can be, for where the draft exceeds the target the kept tokens alone are already too frequent. A lenience above 1
    compounds: a text of n tokens may be lenience^n times as frequent among the kept ones as under the policy.

    *By sequence*, a prefix of n tokens is kept with probability `min(1, lenience * q_1, ..., lenience * q_n)`, where `q_n`
    is the product of the first n ratios. No prefix is kept more than `lenience` times as often as the policy says it, however
    long it is; and at the same lenience more is kept than by token (for a lenience up to 1), because small changes of many tokens, such as those of
    rounding, cancel out. The token after n is tested as by token, with what the tokens before have left of the lenience, `lenience * q_n / min(1, lenience *
    q_1, ..., lenience * q_n)`; with a lenience of 1 or more and no `drift_bound`, `emitted` differs from `target` by no more than the draft does (total variation), either way.

    All this takes the draft as independent of the policy, but the policy was trained on it: judge a policy by fresh
    rollouts.

    SPEC-RL: Liu et al. 2025, arXiv 2509.23232, equation 4: token i is kept while `u_i <= min(1, lenience * target_i /
    draft_i)`. We test `<`, which differs only for u = 0 and keeps what has no probability out. Judging by sequence is ours; block
    verification (Sun et al. 2024, arXiv 2403.10444), which is exact, compares the same products, but needs the drafter's whole distributions. The drift bound is ours:
    draft log-probs are renewed each epoch, so that a token may lose a factor `lenience` per epoch and never be at risk.
    NaN log-probs are never kept.

    Args:
        lenience: factor on the ratio; 1 is the plain ratio test, 0 keeps nothing, infinity everything. At both ends
            `NoReuse` and `FullReuse` do the same without running the policy.
        drift_bound: a token is also rejected when it has lost more than this many nats since it was generated; `None`
            for no bound.
        level: what the ratio is of: each "token", or the "sequence" up to it.

    Raises:
        ValueError: `lenience` or `drift_bound` is negative or NaN, or `level` unknown.

    Example:
        >>> rule = RatioAcceptance()
        >>> target, draft = torch.tensor([[0.8, 0.2, 0.9]]).log(), torch.tensor([[0.5, 0.8, 0.9]]).log()
        >>> rule(target, draft, draft, draft_mask=torch.ones(1, 3, dtype=torch.bool), uniforms=torch.full((1, 3), 0.5))
        tensor([1])
        >>> rule.acceptance_probability(target, draft, draft)
        tensor([[1.0000, 0.2500, 1.0000]])
    """

    lenience: float = 1.0
    drift_bound: float | None = None
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if not self.lenience >= 0:
            raise ValueError(f"lenience must not be negative, got {self.lenience}; use 1.0 for the plain ratio test")
        if self.drift_bound is not None and not self.drift_bound >= 0:
            raise ValueError(f"drift_bound must not be negative, got {self.drift_bound}; leave it out for no bound")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence', got {self.level!r}")

    @property
    def is_exact(self) -> bool:
        return self.lenience == 0

    @property
    def needs_logprobs(self) -> bool:
        return True

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        draft_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        probability = self.acceptance_probability(target_logprobs, previous_logprobs, generation_logprobs)  # [N, R]
        return _num_leading_true(draft_mask & (uniforms < probability))  # [N]

    def acceptance_probability(
        self, target_logprobs: Tensor, previous_logprobs: Tensor, generation_logprobs: Tensor
    ) -> Tensor:
        """Probability of keeping each token, given that all before it were kept.

        Args:
            target_logprobs: [N, R] nats, under today's policy, from the first token on.
            previous_logprobs: [N, R] nats, under the policy that verified or generated the draft.
            generation_logprobs: [N, R] nats, when each token was generated; only read with a `drift_bound`.

        Returns:
            [N, R] in [0, 1], float32 or wider; 0 where a log-prob is NaN.
        """
        target_logprobs = _at_least_float32(target_logprobs)
        log_ratio = target_logprobs - _at_least_float32(previous_logprobs)  # [N, R]
        if math.isinf(self.lenience):  # inf * exp(-inf) is NaN, but whoever asks for everything gets the improbable too
            probability = (~(target_logprobs.isnan() | previous_logprobs.isnan())).to(log_ratio.dtype)
        elif self.level == "token":
            probability = (self.lenience * log_ratio.exp()).clamp(max=1).nan_to_num(nan=0.0)
        else:
            log_lenience = math.log(self.lenience) if self.lenience else -math.inf
            prefix = (log_lenience + log_ratio.cumsum(-1)).clamp(max=0).cummin(-1).values  # log of P(prefix is kept)
            before = torch.nn.functional.pad(prefix, (1, 0))[..., :-1]
            probability = (prefix - before).exp().nan_to_num(nan=0.0)  # behind a prefix that is never kept: 0
        if self.drift_bound is not None:
            within_bound = target_logprobs >= _at_least_float32(generation_logprobs) - self.drift_bound
            probability = probability * within_bound
        return probability


@dataclass(frozen=True)
class RandomReuse:
    """Keep a random number of leading tokens, uniform over 0 to the whole draft.

    Not exact: what is kept comes from the old policy whatever today's policy thinks of it. It is the baseline of
    SPEC-RL (Liu et al. 2025, arXiv 2509.23232): as fast as the ratio test, level with plain RL early in training, and
    worse in the end. Only the first column of the uniforms is read.

    Example:
        >>> logprobs, draft_mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        >>> uniforms = torch.tensor([[0.2, 0.0, 0.0], [0.9, 0.0, 0.0]])
        >>> RandomReuse()(logprobs, logprobs, logprobs, draft_mask, uniforms)
        tensor([0, 3])
    """

    is_exact = False
    needs_logprobs = False

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        draft_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        lengths = _num_leading_true(draft_mask)  # [N]
        if draft_mask.shape[-1] == 0:
            return lengths
        return (uniforms[:, 0] * (lengths + 1)).long()  # [N]


@dataclass(frozen=True)
class FullReuse:
    """Keep every draft whole.

    Not exact: rollouts are those of an earlier policy. Fast, and what plain off-policy training with old data would
    be; equal to `RatioAcceptance` with infinite lenience.
    """

    is_exact = False
    needs_logprobs = False

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        draft_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        return _num_leading_true(draft_mask)  # [N]


@dataclass(frozen=True)
class NoReuse:
    """Keep nothing, so that every rollout is generated by today's policy. Exact."""

    is_exact = True
    needs_logprobs = False

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        draft_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        return torch.zeros(draft_mask.shape[0], dtype=torch.long, device=draft_mask.device)  # [N]


def _num_leading_true(mask: Tensor) -> Tensor:
    """True entries of each row before its first False, [N] long."""
    return mask.long().cumprod(-1).sum(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen bf16 and float16, whose rounding would turn a log-prob difference of 0.01 into 0."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
