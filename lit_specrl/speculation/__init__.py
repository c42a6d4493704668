"""What is kept of past responses and which part of them a new rollout may begin with; how many tokens to draft."""

from lit_specrl.speculation.acceptance import AcceptanceRule, FullReuse, NoReuse, RandomReuse, RatioAcceptance
from lit_specrl.speculation.acceptance_rates import AcceptanceRates
from lit_specrl.speculation.distillation_loss import (
    DistillationLoss,
    acceptance_probability,
    distillation_loss,
    draft_kl,
    expected_acceptance_length,
)
from lit_specrl.speculation.draft_networks import CausalNetwork, DraftNetwork, DraftStep, Eagle3Network
from lit_specrl.speculation.draft_verification import SampledTokens, VerifiedTokens, draw, sample_tokens, verify_drafts
from lit_specrl.speculation.drafter_training import DrafterEvaluation, DrafterTraining
from lit_specrl.speculation.eagle3_head import (
    build_head,
    check_architecture,
    check_drafter_files,
    check_head,
    draft_vocabulary,
    feature_layers,
    load_head,
    save_head,
)
from lit_specrl.speculation.latency_model import LatencyModel
from lit_specrl.speculation.length_schedule import DecodeStep, LengthSchedule, speed_gains
from lit_specrl.speculation.lenience import AdaptiveLenience
from lit_specrl.speculation.lessons import Lesson, LessonBuffer
from lit_specrl.speculation.prompt_lookup import PromptLookup
from lit_specrl.speculation.rank_files import DRAFTER_LESSONS, PREFIX_CACHE, RankFiles, load_ranks, rank_file
from lit_specrl.speculation.reuse_round import ReuseRound, control_samples
from lit_specrl.speculation.reuse_statistics import ReuseStatistics
from lit_specrl.speculation.reward_weights import WeightScope, reward_weights
from lit_specrl.speculation.store import CachedRollout, RolloutStore
from lit_specrl.speculation.tensor_file import RejectedFileError
from lit_specrl.speculation.text_history import Follower, TextHistory

__all__ = [
    "DRAFTER_LESSONS",
    "PREFIX_CACHE",
    "AcceptanceRates",
    "AcceptanceRule",
    "AdaptiveLenience",
    "CachedRollout",
    "CausalNetwork",
    "DecodeStep",
    "DistillationLoss",
    "DraftNetwork",
    "DraftStep",
    "DrafterEvaluation",
    "DrafterTraining",
    "Eagle3Network",
    "Follower",
    "FullReuse",
    "LatencyModel",
    "LengthSchedule",
    "Lesson",
    "LessonBuffer",
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
    "WeightScope",
    "acceptance_probability",
    "build_head",
    "check_architecture",
    "check_drafter_files",
    "check_head",
    "control_samples",
    "distillation_loss",
    "draft_kl",
    "draft_vocabulary",
    "draw",
    "expected_acceptance_length",
    "feature_layers",
    "load_head",
    "load_ranks",
    "rank_file",
    "reward_weights",
    "sample_tokens",
    "save_head",
    "speed_gains",
    "verify_drafts",
]
