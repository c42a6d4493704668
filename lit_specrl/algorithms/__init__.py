"""What is learned: the algorithms as LightningModules."""

from lit_specrl.algorithms.dapo import DAPO
from lit_specrl.algorithms.grpo import GRPO
from lit_specrl.algorithms.ppo import PPO
from lit_specrl.algorithms.rlvr import RLVRModule

__all__ = ["DAPO", "GRPO", "PPO", "RLVRModule"]
