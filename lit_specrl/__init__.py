"""Reinforcement learning with verifiable rewards in PyTorch Lightning, with rollouts that do not repeat themselves.

Names are imported on first use, so that `import lit_specrl` needs neither vLLM nor a GPU and worker processes stay
light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "DAPO": "algorithms",
    "GRPO": "algorithms",
    "PPO": "algorithms",
    "AdvantageEstimator": "algorithms.advantage_estimators",
    "GAE": "algorithms.advantage_estimators",
    "GroupAdvantages": "algorithms.advantage_estimators",
    "LeaveOneOut": "algorithms.advantage_estimators",
    "DynamicSampling": "algorithms.dynamic_sampling",
    "KLPenalty": "losses",
    "PolicyLoss": "losses",
    "TokenLoss": "losses",
    "SeparateCritic": "models.critic",
    "SharedTrunkCritic": "models.critic",
    "RLVRModule": "algorithms.rlvr",
    "PromptDataModule": "data",
    "Policy": "models.policy",
    "TransformersEngine": "engines",
    "VLLMEngine": "engines",
    "RolloutEngine": "engines",
    "Drafter": "drafting",
    "LookUpDrafter": "drafting",
    "NGramDrafter": "drafting",
    "HistoryDrafter": "drafting",
    "DraftModel": "drafting",
    "Eagle3Drafter": "drafting",
    "FSDP2Strategy": "distributed.fsdp2",
    "auto_precision": "precision",
    "AdaptiveScheduler": "callbacks",
    "CompletionWriter": "callbacks",
    "DrafterDistillation": "callbacks",
    "DrafterPretraining": "callbacks",
    "PrefixCache": "callbacks",
    "RolloutCallback": "callbacks",
    "RolloutProgressBar": "callbacks",
    "RolloutRecorder": "callbacks",
    "RunPlan": "callbacks",
    "RunSummary": "callbacks",
    "SpeculativeRollout": "callbacks",
    "TensorBoardReport": "callbacks",
    "EquationReward": "rewards",
    "ExactReward": "rewards",
    "FormatReward": "rewards",
    "MathReward": "rewards",
    "NumericReward": "rewards",
    "OverlongReward": "rewards",
    "AcceptanceRule": "prefix_cache",
    "AdaptiveLenience": "prefix_cache.lenience",
    "Reward": "rewards",
    "RewardFunction": "rewards",
    "Experience": "experience",
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
