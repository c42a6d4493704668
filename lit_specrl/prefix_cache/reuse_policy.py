"""Which rows of a group may begin with their last response, and with how much of it: what reuse costs in learning.

An acceptance rule asks what the policy would say again. A reuse policy comes before it, and asks what may be taken
without a loss: a response that is kept whole is the same lesson again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lit_specrl.prefix_cache.store import CachedRollout
from lit_specrl.seeds import row_uniforms


@dataclass(frozen=True)
class Offer:
    """What a row may take over of its last response, if the acceptance rule keeps it."""

    num_tokens: int
    """Most tokens; 0 answers the row afresh, without a verification."""
    reason: str
    """A word or two, under which rows are counted: `prefix_cache/offers/{reason}`."""


NO_RESPONSE = Offer(0, "none")
"""For rows that have no last response."""


class ReusePolicy(ABC):
    """Chooses what the G rows of a prompt may reuse.

    A policy of one's own needs `__call__` alone. In YAML it stands at `PrefixCache(reuse_policy=...)`, by `class_path`.
    It knows the group by its last responses, which bring rewards, ages and `num_equal` along. That state is saved with
    the cache of each rank, so that a policy needs none of its own.

    Example: reuse what is short.

        >>> class Short(ReusePolicy):
        ...     def __init__(self, num_tokens: int = 100) -> None:
        ...         self.num_tokens = num_tokens
        ...
        ...     def __call__(self, last, seeds):
        ...         return [whole(row, "short") if row and len(row) <= self.num_tokens else NO_RESPONSE for row in last]
        >>> Short()([None, None], [1, 2])
        [Offer(num_tokens=0, reason='none'), Offer(num_tokens=0, reason='none')]
    """

    is_exact: bool = False
    """Whether offers depend on nothing that a response says: not on its tokens, its length or its reward. Only then do
    rollouts under an exact acceptance rule have the policy's distribution."""

    @abstractmethod
    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        """What each row may take over.

        Args:
            last: [G] responses to the prompt at its last visit; `None` where a row has none.
            seeds: [G] of the rows, others in every step. What is random is drawn from them (`row_uniforms`), so that a
                resumed run chooses alike.

        Returns:
            [G] offers; `NO_RESPONSE` for rows without a last response.
        """


class EveryResponse(ReusePolicy):
    """Offer every response whole, as SPEC-RL does (Liu et al. 2025, arXiv 2509.23232)."""

    is_exact = True

    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        return [whole(row, "whole") for row in last]


class BoundedShare(ReusePolicy):
    """Offer the beginning of every response, so that each row says its rest, and earns its reward, afresh.

    All rows get shorter by the same share, and so does the longest one, which decides how long a step takes. With a
    fixed share the first tokens stay for ever, until `PrefixCache(max_reuses)` renews them: set both. A drawn share
    renews them now and then, but no longer shortens the longest row.

    Not exact: a share of a long response is a long beginning, and long ones come more often than the policy says them.
    Ours.

    Args:
        max_reuse_fraction: largest share of a response that is taken over.
        drawn: draw the share anew for every row, uniform between 0 and `max_reuse_fraction`.

    Raises:
        ValueError: `max_reuse_fraction` lies outside (0, 1].

    Example:
        >>> BoundedShare(0.5).num_tokens(9, 0.3)
        4
        >>> BoundedShare(1.0, drawn=True).num_tokens(9, 0.3)
        2
    """

    def __init__(self, max_reuse_fraction: float = 0.5, drawn: bool = False) -> None:
        if not 0 < max_reuse_fraction <= 1:
            raise ValueError(
                f"max_reuse_fraction must lie in (0, 1], got {max_reuse_fraction}; use acceptance='off' to reuse "
                "nothing"
            )
        self.max_reuse_fraction, self.drawn = max_reuse_fraction, drawn

    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        uniforms = row_uniforms(seeds, 1, "share").squeeze(-1).tolist()  # [G]
        return [
            NO_RESPONSE if row is None else Offer(self.num_tokens(len(row), uniform), "share")
            for row, uniform in zip(last, uniforms, strict=True)
        ]

    def num_tokens(self, length: int, uniform: float) -> int:
        """Most tokens to take over of a response.

        Args:
            length: tokens of the response.
            uniform: a number in [0, 1); only read where the share is drawn.
        """
        return int(length * self.max_reuse_fraction * (uniform if self.drawn else 1))


class BySignal(ReusePolicy):
    """Reuse groups whose rewards are all equal, and answer the others afresh.

    Rewards that are all equal give no advantage: such a group teaches nothing, whether it is reused or not. What it
    costs to reuse it is that it might teach something again. It is therefore answered afresh with the probability of
    having regained spread. If n answers of the group in a row had all the same reward, this is `G / (n G + G + 1)` by
    Laplace's rule of succession: about a half after the first time, a third after the second. Not exact: groups that
    happened to agree stay, and the others are drawn again.

    GRESO (Zheng et al. 2025, arXiv 2506.02177) leaves such prompts out before they are answered, with a probability
    that grows with the number of times in a row. Here they stay in their batch.

    Args:
        informative: what groups with spread may reuse; `None` answers them afresh.
        equal: what groups without spread may reuse; `None` for all.
        tolerance: largest difference between rewards that count as equal.
        renewal: probability of answering an equal group afresh; `None` for Laplace's rule.

    Raises:
        ValueError: `tolerance` is negative, or `renewal` lies outside [0, 1].

    Example: half of the responses where there is something to learn, everything elsewhere::

        PrefixCache(log_lenience=0.5, reuse_policy=BySignal(informative=BoundedShare(0.5)))
    """

    def __init__(
        self,
        informative: ReusePolicy | None = None,
        equal: ReusePolicy | None = None,
        tolerance: float = 0.0,
        renewal: float | None = None,
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance}")
        if renewal is not None and not 0 <= renewal <= 1:
            raise ValueError(f"renewal must lie in [0, 1], got {renewal}; leave it out for Laplace's rule")
        self.informative, self.equal = informative, equal or EveryResponse()
        self.tolerance, self.renewal = tolerance, renewal

    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        if not has_equal_rewards(last, self.tolerance):
            if self.informative is None:
                return afresh(last, "informative")
            return _named("informative", self.informative(last, seeds))
        renewal = self.renewal_probability(last)
        if float(row_uniforms(seeds[:1], 1, "renewal")) < renewal:
            return afresh(last, "renewed")
        return _named("equal", self.equal(last, seeds))

    def renewal_probability(self, last: Sequence[CachedRollout | None]) -> float:
        """Of a group without spread."""
        if self.renewal is not None:
            return self.renewal
        times = max(1, *(row.num_equal for row in last if row is not None), 1)
        return len(last) / (times * len(last) + len(last) + 1)


class KeepSuccesses(ReusePolicy):
    """Offer the responses that were rewarded better than the mean of their group, and answer the others afresh.

    A success is worth another look, from the place where it might have gone wrong; failures are worth another attempt.
    Biased: the group looks better than the policy is, and the more so the more of a success is kept. Ours.

    Args:
        successes: how much of a success may be taken over; `None` for all.
        failures: how much of the others, a reward that is not known among them; `None` for nothing.

    Example: three quarters of the successes, half of the failures::

        PrefixCache(log_lenience=0.5, max_reuses=2, reuse_policy=KeepSuccesses(BoundedShare(0.75), BoundedShare(0.5)))
    """

    def __init__(self, successes: ReusePolicy | None = None, failures: ReusePolicy | None = None) -> None:
        self.successes, self.failures = successes or EveryResponse(), failures

    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        rewards = [row.reward for row in last if row is not None and row.reward is not None]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        is_success = [row is not None and row.reward is not None and row.reward > mean for row in last]
        successes = _named("success", self.successes(last, seeds))
        failures = _named("failure", self.failures(last, seeds) if self.failures else afresh(last, "failure"))
        return [
            success if kept else failure for kept, success, failure in zip(is_success, successes, failures, strict=True)
        ]


class RenewInTurns(ReusePolicy):
    """Answer a share of the rows of every group afresh, those whose responses are oldest.

    Each row is then answered afresh in every n-th visit, and every group holds new answers in every step.
    `PrefixCache(max_reuses)` renews all rows of a step at once; `control_fraction` chooses at random. Exact where
    `rest` is: rows are chosen by their age. Ours.

    Args:
        fresh_fraction: share of the rows that are answered afresh, at least one.
        rest: how much the others may take over; `None` for all.

    Raises:
        ValueError: `fresh_fraction` lies outside (0, 1).
    """

    def __init__(self, fresh_fraction: float = 0.5, rest: ReusePolicy | None = None) -> None:
        if not 0 < fresh_fraction < 1:
            raise ValueError(f"fresh_fraction must lie in (0, 1), got {fresh_fraction}")
        self.fresh_fraction, self.rest = fresh_fraction, rest or EveryResponse()
        self.is_exact = self.rest.is_exact

    def __call__(self, last: Sequence[CachedRollout | None], seeds: Sequence[int]) -> list[Offer]:
        there = [index for index, row in enumerate(last) if row is not None]
        oldest = sorted(there, key=lambda index: (-last[index].num_reuses, seeds[index]))  # type: ignore[union-attr]
        num_fresh = max(1, round(self.fresh_fraction * len(last))) - (len(last) - len(there))
        renewed = set(oldest[: max(0, num_fresh)])
        return [
            Offer(0, "renewed") if index in renewed else offer for index, offer in enumerate(self.rest(last, seeds))
        ]


def whole(row: CachedRollout | None, reason: str) -> Offer:
    """The whole of a response."""
    return NO_RESPONSE if row is None else Offer(len(row), reason)


def has_equal_rewards(last: Sequence[CachedRollout | None], tolerance: float = 0.0) -> bool:
    """Whether the rewards of the last responses of a group are known and all equal; not if there are none."""
    rewards = [row.reward for row in last if row is not None]
    known = [reward for reward in rewards if reward is not None]
    return bool(known) and len(known) == len(rewards) and max(known) - min(known) <= tolerance


def afresh(last: Sequence[CachedRollout | None], reason: str) -> list[Offer]:
    """Nothing of any response."""
    return [NO_RESPONSE if row is None else Offer(0, reason) for row in last]


def _named(reason: str, offers: Sequence[Offer]) -> list[Offer]:
    return [offer if offer == NO_RESPONSE else Offer(offer.num_tokens, reason) for offer in offers]
