"""What is kept of past responses, and which part of them a new rollout may begin with."""

from lit_specrl.speculation.acceptance import AcceptanceRule, FullReuse, NoReuse, RandomReuse, RatioAcceptance
from lit_specrl.speculation.lenience import AdaptiveLenience
from lit_specrl.speculation.reuse_weights import reuse_importance_weights
from lit_specrl.speculation.store import CachedRollout, RolloutStore
from lit_specrl.speculation.tensor_file import RejectedFileError

__all__ = [
    "AcceptanceRule",
    "AdaptiveLenience",
    "CachedRollout",
    "FullReuse",
    "NoReuse",
    "RandomReuse",
    "RatioAcceptance",
    "RejectedFileError",
    "RolloutStore",
    "reuse_importance_weights",
]
