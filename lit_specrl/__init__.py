"""Reinforcement learning with verifiable rewards in PyTorch Lightning, with rollouts that do not repeat themselves.

Names are imported on first use, so that `import lit_specrl` needs neither vLLM nor a GPU and worker processes stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "GRPO": "module",
    "RLVRModule": "module",
    "PromptDataModule": "data",
    "Policy": "policy",
    "TransformersEngine": "rollout",
    "VLLMEngine": "rollout",
    "RolloutEngine": "rollout",
    "CompletionWriter": "callbacks",
    "RolloutCallback": "callbacks",
    "RolloutProgressBar": "callbacks",
    "RolloutRecorder": "callbacks",
    "RunSummary": "callbacks",
    "SpeculativeRollout": "callbacks",
    "TensorBoardReport": "callbacks",
    "ExactReward": "rewards",
    "FormatReward": "rewards",
    "MathReward": "rewards",
    "NumericReward": "rewards",
    "OverlongReward": "rewards",
    "Reward": "rewards",
    "RewardFunction": "rewards",
    "Experience": "types",
    "PromptBatch": "types",
    "RolloutRequest": "types",
    "Rollouts": "types",
    "SamplingConfig": "types",
}
__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from lit_specrl.callbacks import (
        CompletionWriter,
        RolloutCallback,
        RolloutProgressBar,
        RolloutRecorder,
        RunSummary,
        SpeculativeRollout,
        TensorBoardReport,
    )
    from lit_specrl.data import PromptDataModule
    from lit_specrl.module import GRPO, RLVRModule
    from lit_specrl.policy import Policy
    from lit_specrl.rewards import (
        ExactReward,
        FormatReward,
        MathReward,
        NumericReward,
        OverlongReward,
        Reward,
        RewardFunction,
    )
    from lit_specrl.rollout import RolloutEngine, TransformersEngine, VLLMEngine
    from lit_specrl.types import Experience, PromptBatch, RolloutRequest, Rollouts, SamplingConfig


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lit_specrl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"lit_specrl.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
