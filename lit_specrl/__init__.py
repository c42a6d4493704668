"""Reinforcement learning with verifiable rewards in PyTorch Lightning, with rollouts that do not repeat themselves.

Names are imported on first use, so that `import lit_specrl` needs neither vLLM nor a GPU and worker processes stay
light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from lit_specrl.algorithms import DAPO as DAPO
    from lit_specrl.algorithms import GRPO as GRPO
    from lit_specrl.algorithms import PPO as PPO
    from lit_specrl.algorithms.advantage_estimators import GAE as GAE
    from lit_specrl.algorithms.advantage_estimators import GDPO as GDPO
    from lit_specrl.algorithms.advantage_estimators import GPG as GPG
    from lit_specrl.algorithms.advantage_estimators import OPO as OPO
    from lit_specrl.algorithms.advantage_estimators import AdvantageEstimator as AdvantageEstimator
    from lit_specrl.algorithms.advantage_estimators import GroupAdvantages as GroupAdvantages
    from lit_specrl.algorithms.advantage_estimators import LeaveOneOut as LeaveOneOut
    from lit_specrl.algorithms.advantage_estimators import PassAtK as PassAtK
    from lit_specrl.algorithms.advantage_estimators import ReinforcePlusPlus as ReinforcePlusPlus
    from lit_specrl.algorithms.advantage_estimators import ReinforcePlusPlusBaseline as ReinforcePlusPlusBaseline
    from lit_specrl.algorithms.dynamic_sampling import DynamicSampling as DynamicSampling
    from lit_specrl.algorithms.entropy_bonus import EntropyTarget as EntropyTarget
    from lit_specrl.algorithms.rlvr import RLVRModule as RLVRModule
    from lit_specrl.callbacks import AdaptiveScheduler as AdaptiveScheduler
    from lit_specrl.callbacks import CompletionWriter as CompletionWriter
    from lit_specrl.callbacks import DrafterDistillation as DrafterDistillation
    from lit_specrl.callbacks import DrafterPretraining as DrafterPretraining
    from lit_specrl.callbacks import LoggerReport as LoggerReport
    from lit_specrl.callbacks import PrefixCache as PrefixCache
    from lit_specrl.callbacks import RolloutCallback as RolloutCallback
    from lit_specrl.callbacks import RolloutJournal as RolloutJournal
    from lit_specrl.callbacks import RolloutProgressBar as RolloutProgressBar
    from lit_specrl.callbacks import RolloutRecorder as RolloutRecorder
    from lit_specrl.callbacks import RunPlan as RunPlan
    from lit_specrl.callbacks import RunSummary as RunSummary
    from lit_specrl.callbacks import SpeculativeRollout as SpeculativeRollout
    from lit_specrl.callbacks import TensorBoardReport as TensorBoardReport
    from lit_specrl.data import Curriculum as Curriculum
    from lit_specrl.data import Mixture as Mixture
    from lit_specrl.data import PromptDataModule as PromptDataModule
    from lit_specrl.data import PromptSchedule as PromptSchedule
    from lit_specrl.data import SkipSolved as SkipSolved
    from lit_specrl.distributed.fsdp2 import FSDP2Strategy as FSDP2Strategy
    from lit_specrl.drafting import Drafter as Drafter
    from lit_specrl.drafting import DraftModel as DraftModel
    from lit_specrl.drafting import Eagle3Drafter as Eagle3Drafter
    from lit_specrl.drafting import HistoryDrafter as HistoryDrafter
    from lit_specrl.drafting import LookUpDrafter as LookUpDrafter
    from lit_specrl.drafting import NGramDrafter as NGramDrafter
    from lit_specrl.drafting.distillation.draft_losses import DraftLoss as DraftLoss
    from lit_specrl.engines import RolloutEngine as RolloutEngine
    from lit_specrl.engines import TransformersEngine as TransformersEngine
    from lit_specrl.engines import VLLMEngine as VLLMEngine
    from lit_specrl.environments import CalculatorEnvironment as CalculatorEnvironment
    from lit_specrl.environments import Environment as Environment
    from lit_specrl.environments import Observation as Observation
    from lit_specrl.environments import ToolEnvironment as ToolEnvironment
    from lit_specrl.experience import Experience as Experience
    from lit_specrl.losses import KLPenalty as KLPenalty
    from lit_specrl.losses import PolicyLoss as PolicyLoss
    from lit_specrl.losses import TokenLoss as TokenLoss
    from lit_specrl.models.critic import SeparateCritic as SeparateCritic
    from lit_specrl.models.critic import SharedTrunkCritic as SharedTrunkCritic
    from lit_specrl.models.policy import Policy as Policy
    from lit_specrl.precision import auto_precision as auto_precision
    from lit_specrl.prefix_cache import AcceptanceRule as AcceptanceRule
    from lit_specrl.prefix_cache import ReusePolicy as ReusePolicy
    from lit_specrl.prefix_cache.lenience import AdaptiveLenience as AdaptiveLenience
    from lit_specrl.rewards import EnvironmentReward as EnvironmentReward
    from lit_specrl.rewards import EquationReward as EquationReward
    from lit_specrl.rewards import ExactReward as ExactReward
    from lit_specrl.rewards import FormatReward as FormatReward
    from lit_specrl.rewards import JudgeReward as JudgeReward
    from lit_specrl.rewards import MathReward as MathReward
    from lit_specrl.rewards import NumericReward as NumericReward
    from lit_specrl.rewards import OverlongReward as OverlongReward
    from lit_specrl.rewards import Reward as Reward
    from lit_specrl.rewards import RewardFunction as RewardFunction
    from lit_specrl.rewards import RewardModel as RewardModel
    from lit_specrl.types import Episode as Episode
    from lit_specrl.types import PromptBatch as PromptBatch
    from lit_specrl.types import RolloutRequest as RolloutRequest
    from lit_specrl.types import Rollouts as Rollouts
    from lit_specrl.types import SamplingConfig as SamplingConfig

_EXPORTS = {
    "DAPO": "algorithms",
    "GRPO": "algorithms",
    "PPO": "algorithms",
    "AdvantageEstimator": "algorithms.advantage_estimators",
    "GAE": "algorithms.advantage_estimators",
    "GDPO": "algorithms.advantage_estimators",
    "GPG": "algorithms.advantage_estimators",
    "OPO": "algorithms.advantage_estimators",
    "GroupAdvantages": "algorithms.advantage_estimators",
    "LeaveOneOut": "algorithms.advantage_estimators",
    "PassAtK": "algorithms.advantage_estimators",
    "ReinforcePlusPlus": "algorithms.advantage_estimators",
    "ReinforcePlusPlusBaseline": "algorithms.advantage_estimators",
    "EntropyTarget": "algorithms.entropy_bonus",
    "DynamicSampling": "algorithms.dynamic_sampling",
    "KLPenalty": "losses",
    "PolicyLoss": "losses",
    "TokenLoss": "losses",
    "SeparateCritic": "models.critic",
    "SharedTrunkCritic": "models.critic",
    "RLVRModule": "algorithms.rlvr",
    "PromptDataModule": "data",
    "PromptSchedule": "data",
    "Mixture": "data",
    "Curriculum": "data",
    "SkipSolved": "data",
    "Policy": "models.policy",
    "TransformersEngine": "engines",
    "VLLMEngine": "engines",
    "RolloutEngine": "engines",
    "CalculatorEnvironment": "environments",
    "Environment": "environments",
    "Observation": "environments",
    "ToolEnvironment": "environments",
    "Drafter": "drafting",
    "LookUpDrafter": "drafting",
    "NGramDrafter": "drafting",
    "HistoryDrafter": "drafting",
    "DraftModel": "drafting",
    "Eagle3Drafter": "drafting",
    "DraftLoss": "drafting.distillation.draft_losses",
    "FSDP2Strategy": "distributed.fsdp2",
    "auto_precision": "precision",
    "AdaptiveScheduler": "callbacks",
    "CompletionWriter": "callbacks",
    "DrafterDistillation": "callbacks",
    "DrafterPretraining": "callbacks",
    "LoggerReport": "callbacks",
    "PrefixCache": "callbacks",
    "RolloutCallback": "callbacks",
    "RolloutJournal": "callbacks",
    "RolloutProgressBar": "callbacks",
    "RolloutRecorder": "callbacks",
    "RunPlan": "callbacks",
    "RunSummary": "callbacks",
    "SpeculativeRollout": "callbacks",
    "TensorBoardReport": "callbacks",
    "EnvironmentReward": "rewards",
    "EquationReward": "rewards",
    "ExactReward": "rewards",
    "FormatReward": "rewards",
    "JudgeReward": "rewards",
    "MathReward": "rewards",
    "NumericReward": "rewards",
    "OverlongReward": "rewards",
    "AcceptanceRule": "prefix_cache",
    "ReusePolicy": "prefix_cache",
    "AdaptiveLenience": "prefix_cache.lenience",
    "Reward": "rewards",
    "RewardFunction": "rewards",
    "RewardModel": "rewards",
    "Experience": "experience",
    "Episode": "types",
    "PromptBatch": "types",
    "RolloutRequest": "types",
    "Rollouts": "types",
    "SamplingConfig": "types",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lit_specrl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"lit_specrl.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
