"""What is kept of past responses and which part of them a new rollout may begin with; how many tokens to draft."""

from lit_specrl.speculation.acceptance import AcceptanceRule, FullReuse, NoReuse, RandomReuse, RatioAcceptance
from lit_specrl.speculation.acceptance_rates import AcceptanceRates
from lit_specrl.speculation.draft_verification import SampledTokens, VerifiedTokens, draw, sample_tokens, verify_drafts
from lit_specrl.speculation.latency_model import LatencyModel
from lit_specrl.speculation.length_schedule import DecodeStep, LengthSchedule, speed_gains
from lit_specrl.speculation.lenience import AdaptiveLenience
from lit_specrl.speculation.prompt_lookup import PromptLookup
from lit_specrl.speculation.rank_files import RankFiles, load_ranks
from lit_specrl.speculation.reuse_round import ReuseRound, control_samples
from lit_specrl.speculation.reuse_statistics import ReuseStatistics
from lit_specrl.speculation.store import CachedRollout, RolloutStore
from lit_specrl.speculation.tensor_file import RejectedFileError
from lit_specrl.speculation.text_history import Follower, TextHistory

__all__ = [
    "AcceptanceRates",
    "AcceptanceRule",
    "AdaptiveLenience",
    "CachedRollout",
    "DecodeStep",
    "Follower",
    "FullReuse",
    "LatencyModel",
    "LengthSchedule",
    "NoReuse",
    "PromptLookup",
    "RandomReuse",
    "RankFiles",
    "RatioAcceptance",
    "RejectedFileError",
    "ReuseRound",
    "ReuseStatistics",
    "RolloutStore",
    "SampledTokens",
    "TextHistory",
    "VerifiedTokens",
    "control_samples",
    "draw",
    "load_ranks",
    "sample_tokens",
    "speed_gains",
    "verify_drafts",
]
