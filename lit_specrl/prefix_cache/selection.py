"""The responses that a request's rows may begin with: what is in the cache, chosen by group."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from lit_specrl.prefix_cache.reuse import control_samples
from lit_specrl.prefix_cache.reuse_policy import NO_RESPONSE, EveryResponse, Offer, ReusePolicy, afresh
from lit_specrl.prefix_cache.row_data import data_digest
from lit_specrl.prefix_cache.store import CachedRollout, RolloutStore
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import RolloutRequest


@dataclass(frozen=True)
class Selection:
    """What each row of a request may reuse, [N] each."""

    found: list[CachedRollout | None] = field(default_factory=list)
    """The row's last response, offered or not."""
    offers: list[Offer] = field(default_factory=list)

    @property
    def cached(self) -> list[CachedRollout | None]:
        """Responses that are offered, as a whole or in part."""
        return [row if offer.num_tokens else None for row, offer in zip(self.found, self.offers, strict=True)]

    @property
    def limits(self) -> list[int]:
        """Most tokens of each that may be taken over."""
        return [offer.num_tokens for offer in self.offers]

    @property
    def num_equal(self) -> list[int]:
        """`CachedRollout.num_equal`, 0 where nothing was found."""
        return [0 if row is None else row.num_equal for row in self.found]

    @property
    def counts(self) -> OfferCounts:
        found = [offer for row, offer in zip(self.found, self.offers, strict=True) if row is not None]
        lengths = [len(row) for row in self.found if row is not None]
        return OfferCounts(
            len(found), sum(lengths), sum(offer.num_tokens for offer in found), Counter(o.reason for o in found)
        )


@dataclass(frozen=True)
class OfferCounts:
    """Sums over rows that have a last response; those of several requests and ranks are added up."""

    num_found: int = 0
    num_found_tokens: int = 0
    num_offered_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows by the reason of their offer."""

    def __add__(self, other: OfferCounts) -> OfferCounts:
        return OfferCounts(
            self.num_found + other.num_found,
            self.num_found_tokens + other.num_found_tokens,
            self.num_offered_tokens + other.num_offered_tokens,
            self.reasons + other.reasons,
        )

    def metrics(self) -> dict[str, float]:
        """Share of the tokens of last responses that was offered, and of the rows by reason; nothing without any."""
        if not self.num_found:
            return {}
        offered = self.num_offered_tokens / max(1, self.num_found_tokens)
        shares = {f"offers/{reason}": count / self.num_found for reason, count in sorted(self.reasons.items())}
        return {f"prefix_cache/{name}": value for name, value in ({"offered_fraction": offered} | shares).items()}


class Selector:
    """Chooses what rows may reuse, by the settings of `PrefixCache` that have the same names.

    Args:
        reuse_policy: asked about every group; `None` for whole responses.
        max_reuses: see there; `None` for no limit.
        control_fraction: see there.
    """

    def __init__(
        self, reuse_policy: ReusePolicy | None = None, max_reuses: int | None = None, control_fraction: float = 0.0
    ) -> None:
        if max_reuses is not None and max_reuses < 1:
            raise ValueError(f"max_reuses must be at least 1, got {max_reuses}; use acceptance='off' to reuse nothing")
        if not 0 <= control_fraction < 1:
            raise ValueError(f"control_fraction must lie in [0, 1), got {control_fraction}")
        self._policy = reuse_policy or EveryResponse()
        self._max_reuses = math.inf if max_reuses is None else max_reuses
        self._control_fraction = control_fraction

    def select(self, request: RolloutRequest, store: RolloutStore, group_fraction: float) -> Selection:
        """Look up the last responses of a request, without rewards that belong to other data, and choose.

        Args:
            request: the request.
            store: last responses.
            group_fraction: share of the groups that reuse at all.
        """
        size = request.sampling.num_generations
        selection = Selection()
        for group, uid in enumerate(request.prompts.uids):
            seeds = request.seeds[group * size : (group + 1) * size]
            data = data_digest(request.prompts, group)
            last = [_current(store.get(uid, sample), data) for sample in range(size)]
            selection.found.extend(last)
            selection.offers.extend(self._offers(last, seeds, group_fraction))
        return selection

    def _offers(self, last: list[CachedRollout | None], seeds: list[int], group_fraction: float) -> list[Offer]:
        if group_fraction < 1 and float(row_uniforms(seeds[:1], 1, "reuse")) >= group_fraction:
            return afresh(last, "withheld")
        control = control_samples(seeds, self._control_fraction)
        offers = self._policy(last, seeds)
        if len(offers) != len(last):
            raise ValueError(
                f"{type(self._policy).__name__} must make an offer for each of {len(last)} rows, got {len(offers)}"
            )
        return [
            self._final(row, offer, sample in control)
            for sample, (row, offer) in enumerate(zip(last, offers, strict=True))
        ]

    def _final(self, row: CachedRollout | None, offer: Offer, is_control: bool) -> Offer:
        if row is None:
            return NO_RESPONSE
        if is_control:
            return Offer(0, "control")
        return Offer(0, "max_reuses") if row.num_reuses >= self._max_reuses else offer


def _current(row: CachedRollout | None, data: str) -> CachedRollout | None:
    """The row, without rewards for which the columns of its prompt were others."""
    return row if row is None or row.data in ("", data) else row.without_rewards()
