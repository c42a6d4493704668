"""How much of a cached response begins today's rollout.

A rule looks at N cached responses, right-padded to R tokens, and says how many leading tokens of each are kept: the
verified prefix. The policy continues from there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor


class AcceptanceRule(ABC):
    """Decides how many leading tokens of each cached response are kept.

    A rule of one's own needs `__call__` alone; the attributes say what else is asked about it. In YAML it stands at
    `PrefixCache(acceptance=...)`, by `class_path`.

    Example: keep a response up to the first token that has become improbable.

        >>> class Threshold(AcceptanceRule):
        ...     def __init__(self, nats: float = 3.0) -> None:
        ...         self.nats = nats
        ...
        ...     def __call__(self, target_logprobs, previous_logprobs, generation_logprobs, cached_mask, uniforms):
        ...         return num_leading_true(cached_mask & (target_logprobs > -self.nats))
        >>> logprobs = torch.tensor([[-1.0, -4.0, -1.0]])
        >>> Threshold()(logprobs, logprobs, logprobs, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3))
        tensor([1])
    """

    is_exact: bool = False
    """Whether prefix and continuation together are distributed as if the policy had generated both."""
    needs_logprobs: bool = True
    """Whether the rule looks at log-probs. Otherwise the policy is not run, and the log-probs hold any values."""
    allows_truncated_sampling: bool = False
    """Whether a rule that looks at log-probs, which are of the whole softmax, is right under `top_p` and the like."""
    keeps_nothing: bool = False
    """Whether no token is ever kept, so that there is nothing to verify."""
    lenience: float | None = None
    """Factor on the acceptance ratio; `None` for a rule that has none, which `AdaptiveLenience` cannot steer."""

    @abstractmethod
    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        cached_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        """Lengths of the verified prefixes.

        The columns may be the first ones of longer responses: a response is verified block by block, and rejected in
        the block in which fewer tokens are kept than the mask has.

        Args:
            target_logprobs: [N, R] nats, of the cached tokens under today's policy.
            previous_logprobs: [N, R] nats, of the same tokens when the response was last verified or generated.
            generation_logprobs: [N, R] nats, of each token when it was generated.
            cached_mask: [N, R] bool, True on the cached tokens, which begin in the first column.
            uniforms: [N, R] float32 or float64 in [0, 1), drawn anew in every step.

        Returns:
            Tokens kept of each response, [N] long; 0 for an empty one.
        """

    def with_lenience(self, lenience: float) -> AcceptanceRule:
        """The same rule with another lenience; as it stands here, for dataclasses with such a field."""
        return replace(self, lenience=lenience)  # type: ignore[type-var]


@dataclass(frozen=True)
class RatioAcceptance(AcceptanceRule):
    """Keep tokens while their probability under today's policy is not much lower than before; by token or by sequence.

    Not exact: after a rejection, generation goes on from the policy. The residual distribution, which would repair the
    distribution, is not known. Let `previous` and `target` be the distributions of the next token after a kept prefix,
    then and now, and `accept` the probability of keeping that token. The next token of the rollout is distributed as

        emitted = previous * accept + (1 - sum(previous * accept)) * target

    and after a rejection as `target`.

    *By token* (SPEC-RL), without `drift_bound`, `emitted = min(previous, lenience * target) + (1 - A) * target` with
    `A = sum(min(previous, lenience * target))`. This equals `target` if and only if `min(previous / target, lenience)`
    is the same number for all tokens that the target can emit. Examples: target and previous are equal; the lenience is
    0; the lenience is so small that `lenience * target` nowhere exceeds `previous` (rejection sampling). With a
    lenience up to 1, a continuation from `(target - min(previous, lenience * target)) / (1 - A)` would be exact. With a
    higher lenience none can be: where `previous` exceeds `target`, the kept tokens alone are already too frequent. A
    lenience above 1 compounds: a text of n tokens may be lenience^n times as frequent among the kept ones as under the
    policy.

    *By sequence*, a prefix of n tokens is kept with probability `min(1, lenience * q_1, ..., lenience * q_n)`, where
    `q_n` is the product of the first n ratios. No prefix is kept more than `lenience` times as often as the policy
    samples it, however long it is. At the same lenience (up to 1) more is kept than by token, because small changes of
    many tokens, such as those of rounding, cancel out. The token after n is tested as by token, with what the tokens
    before have left of the lenience: `lenience * q_n / min(1, lenience * q_1, ..., lenience * q_n)`.

    With a lenience of 1 or more and no `drift_bound`, `emitted` differs from `target` by no more than `previous` does
    (total variation), either way. All this takes the cached response as independent of the policy, but the policy was
    trained on it: judge a policy by fresh rollouts.

    SPEC-RL: Liu et al. 2025, arXiv 2509.23232, equation 4: token i is kept while `u_i <= min(1, lenience * target_i /
    previous_i)`. We test `<`, which differs only for u = 0 and keeps out what has no probability. Judging by sequence
    is ours. Block verification (Sun et al. 2024, arXiv 2403.10444) compares the same products and is exact, but needs
    the whole distributions of the proposing model. The drift bound is ours: previous log-probs are renewed each epoch,
    so that a token may lose a factor `lenience` per epoch and never be at risk. NaN log-probs are never kept.

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
        >>> target, previous = torch.tensor([[0.8, 0.2, 0.9]]).log(), torch.tensor([[0.5, 0.8, 0.9]]).log()
        >>> mask, uniforms = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), 0.5)
        >>> rule(target, previous, previous, mask, uniforms)
        tensor([1])
        >>> rule.acceptance_probability(target, previous, previous)
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
    def is_exact(self) -> bool:  # type: ignore[override]
        return self.lenience == 0

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        cached_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        probability = self.acceptance_probability(target_logprobs, previous_logprobs, generation_logprobs)  # [N, R]
        return num_leading_true(cached_mask & (uniforms < probability))  # [N]

    def acceptance_probability(
        self, target_logprobs: Tensor, previous_logprobs: Tensor, generation_logprobs: Tensor
    ) -> Tensor:
        """Probability of keeping each token, given that all before it were kept.

        Args:
            target_logprobs: [N, R] nats, under today's policy, from the first token on.
            previous_logprobs: [N, R] nats, under the policy that last verified or generated the response.
            generation_logprobs: [N, R] nats, when each token was generated; only read with a `drift_bound`.

        Returns:
            [N, R] in [0, 1], float32 or wider; 0 where a log-prob is NaN.
        """
        target_logprobs = _at_least_float32(target_logprobs)
        log_ratio = target_logprobs - _at_least_float32(previous_logprobs)  # [N, R]
        if math.isinf(self.lenience):  # inf * exp(-inf) is NaN, but the improbable is kept, too
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
class RandomReuse(AcceptanceRule):
    """Keep a random number of leading tokens, uniform over 0 to the whole response.

    Not exact: the kept tokens come from the old policy, however improbable they are today. It is a baseline of
    SPEC-RL (Liu et al. 2025, arXiv 2509.23232): as fast as the ratio test, level with plain RL early in training, and
    worse in the end. Only the first column of the uniforms is read.

    Example:
        >>> logprobs, cached_mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        >>> uniforms = torch.tensor([[0.2, 0.0, 0.0], [0.9, 0.0, 0.0]])
        >>> RandomReuse()(logprobs, logprobs, logprobs, cached_mask, uniforms)
        tensor([0, 3])
    """

    needs_logprobs = False

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        cached_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        lengths = num_leading_true(cached_mask)  # [N]
        if cached_mask.shape[-1] == 0:
            return lengths
        return (uniforms[:, 0] * (lengths + 1)).long()  # [N]


@dataclass(frozen=True)
class FullReuse(AcceptanceRule):
    """Keep every cached response whole.

    Not exact: rollouts are those of an earlier policy. Fast, and what plain off-policy training with old data would
    be; equal to `RatioAcceptance` with infinite lenience.
    """

    needs_logprobs = False

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        cached_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        return num_leading_true(cached_mask)  # [N]


@dataclass(frozen=True)
class NoReuse(AcceptanceRule):
    """Keep nothing, so that every rollout is generated by today's policy. Exact."""

    is_exact = True
    needs_logprobs = False
    keeps_nothing = True

    def __call__(
        self,
        target_logprobs: Tensor,
        previous_logprobs: Tensor,
        generation_logprobs: Tensor,
        cached_mask: Tensor,
        uniforms: Tensor,
    ) -> Tensor:
        return torch.zeros(cached_mask.shape[0], dtype=torch.long, device=cached_mask.device)  # [N]


def acceptance_rule(
    acceptance: str | AcceptanceRule, lenience: float | None = None, drift_bound: float | None = None
) -> AcceptanceRule:
    """The rule of a name, or the given one.

    Args:
        acceptance: "ratio", "sequence", "random", "full" or "off"; or a rule.
        lenience: of a rule that has one; `None` for 1, or for what the given rule has.
        drift_bound: of "ratio" and "sequence".

    Raises:
        ValueError: an unknown name, or a setting that the rule does not have.
    """
    if isinstance(acceptance, AcceptanceRule):
        given = {"lenience": lenience if acceptance.lenience is None else None, "drift_bound": drift_bound}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value} belongs to a named rule; give it to {type(acceptance).__name__}")
        return acceptance if lenience is None else acceptance.with_lenience(lenience)
    if acceptance in ("ratio", "sequence"):
        level: Literal["token", "sequence"] = "token" if acceptance == "ratio" else "sequence"
        return RatioAcceptance(1.0 if lenience is None else lenience, drift_bound, level)
    if lenience not in (None, 1):
        rank_zero_warn(
            f"lenience={lenience} belongs to acceptance='ratio' or 'sequence' and is ignored by {acceptance!r}"
        )
    if drift_bound is not None:
        raise ValueError(
            f"drift_bound={drift_bound} belongs to acceptance='ratio' or 'sequence' and would be ignored by "
            f"{acceptance!r}"
        )
    rules: dict[str, AcceptanceRule] = {"random": RandomReuse(), "full": FullReuse(), "off": NoReuse()}
    if acceptance not in rules:
        raise ValueError(
            f"acceptance must be 'ratio', 'sequence', 'random', 'full' or 'off', got {acceptance!r}; a rule of one's "
            "own is named by class_path"
        )
    return rules[acceptance]


def num_leading_true(mask: Tensor) -> Tensor:
    """True entries of each row [N, R] before its first False, [N] long."""
    return mask.long().cumprod(-1).sum(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen bf16 and float16, whose rounding would turn a log-prob difference of 0.01 into 0."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
