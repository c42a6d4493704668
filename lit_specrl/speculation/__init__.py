"""What is kept of past responses, and which part of them a new rollout may begin with."""

from lit_specrl.speculation.acceptance import AcceptanceRule, FullReuse, NoReuse, RandomReuse, RatioAcceptance
from lit_specrl.speculation.lenience import AdaptiveLenience
from lit_specrl.speculation.rank_files import RankFiles, load_ranks
from lit_specrl.speculation.reuse_round import ReuseRound, control_samples
from lit_specrl.speculation.reuse_statistics import ReuseStatistics
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
    "RankFiles",
    "RatioAcceptance",
    "RejectedFileError",
    "ReuseRound",
    "ReuseStatistics",
    "RolloutStore",
    "control_samples",
    "load_ranks",
    "reuse_importance_weights",
]
