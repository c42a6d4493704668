"""Callbacks around rollouts."""

from lit_specrl.callbacks.adaptive_scheduler import AdaptiveScheduler
from lit_specrl.callbacks.completion_writer import CompletionWriter
from lit_specrl.callbacks.drafter_distillation import DrafterDistillation
from lit_specrl.callbacks.drafter_pretraining import DrafterPretraining
from lit_specrl.callbacks.logger_report import LoggerReport, TensorBoardReport
from lit_specrl.callbacks.prefix_cache import PrefixCache
from lit_specrl.callbacks.progress_bar import RolloutProgressBar
from lit_specrl.callbacks.rollout_callback import RolloutCallback
from lit_specrl.callbacks.rollout_journal import RolloutJournal
from lit_specrl.callbacks.rollout_recorder import RolloutRecorder
from lit_specrl.callbacks.run_plan import RunPlan
from lit_specrl.callbacks.run_summary import RunSummary
from lit_specrl.callbacks.speculative_rollout import SpeculativeRollout

__all__ = [
    "AdaptiveScheduler",
    "CompletionWriter",
    "DrafterDistillation",
    "DrafterPretraining",
    "LoggerReport",
    "PrefixCache",
    "RolloutCallback",
    "RolloutJournal",
    "RolloutProgressBar",
    "RolloutRecorder",
    "RunPlan",
    "RunSummary",
    "SpeculativeRollout",
    "TensorBoardReport",
]
