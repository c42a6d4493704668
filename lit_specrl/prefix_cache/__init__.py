"""SPEC-RL: which part of an earlier response a new rollout begins with."""

from lit_specrl.prefix_cache.acceptance import (
    AcceptanceRule,
    FullReuse,
    NoReuse,
    RandomReuse,
    RatioAcceptance,
    num_leading_true,
)
from lit_specrl.prefix_cache.reuse_policy import (
    BoundedShare,
    BySignal,
    EveryResponse,
    KeepSuccesses,
    Offer,
    RenewInTurns,
    ReusePolicy,
)

__all__ = [
    "AcceptanceRule",
    "BoundedShare",
    "BySignal",
    "EveryResponse",
    "FullReuse",
    "KeepSuccesses",
    "NoReuse",
    "Offer",
    "RandomReuse",
    "RatioAcceptance",
    "RenewInTurns",
    "ReusePolicy",
    "num_leading_true",
]
