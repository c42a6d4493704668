"""Rewards: text in, numbers out."""

from lit_specrl.rewards.base import Reward
from lit_specrl.rewards.environment_reward import EnvironmentReward
from lit_specrl.rewards.equation import EquationReward
from lit_specrl.rewards.exact import ExactReward
from lit_specrl.rewards.format import FormatReward
from lit_specrl.rewards.function import RewardFunction
from lit_specrl.rewards.judge import JudgeReward
from lit_specrl.rewards.math_reward import MathReward
from lit_specrl.rewards.numeric import NumericReward
from lit_specrl.rewards.overlong import OverlongReward
from lit_specrl.rewards.reward_model import RewardModel
from lit_specrl.rewards.reward_set import RewardScores, RewardSet

__all__ = [
    "EnvironmentReward",
    "EquationReward",
    "ExactReward",
    "FormatReward",
    "JudgeReward",
    "MathReward",
    "NumericReward",
    "OverlongReward",
    "Reward",
    "RewardFunction",
    "RewardModel",
    "RewardScores",
    "RewardSet",
]
