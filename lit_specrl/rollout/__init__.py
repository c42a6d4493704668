"""Engines that generate rollouts."""

from lit_specrl.rollout.engine import RolloutEngine
from lit_specrl.rollout.transformers_engine import TransformersEngine
from lit_specrl.rollout.vllm_engine import VLLMEngine

__all__ = ["RolloutEngine", "TransformersEngine", "VLLMEngine"]
