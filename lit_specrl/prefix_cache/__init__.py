"""SPEC-RL: which part of an earlier response a new rollout begins with."""

from lit_specrl.prefix_cache.acceptance import (
    AcceptanceRule,
    FullReuse,
    NoReuse,
    RandomReuse,
    RatioAcceptance,
    num_leading_true,
)

__all__ = ["AcceptanceRule", "FullReuse", "NoReuse", "RandomReuse", "RatioAcceptance", "num_leading_true"]
