"""Engines that generate rollouts, and drafters that propose tokens to them."""

from lit_specrl.drafting.drafters import Drafter, DraftModel, Eagle3Drafter, HistoryDrafter, NGramDrafter
from lit_specrl.rollout.engine import RolloutEngine
from lit_specrl.rollout.transformers_engine import TransformersEngine
from lit_specrl.rollout.vllm_engine import VLLMEngine

__all__ = [
    "DraftModel",
    "Drafter",
    "Eagle3Drafter",
    "HistoryDrafter",
    "NGramDrafter",
    "RolloutEngine",
    "TransformersEngine",
    "VLLMEngine",
]
