"""Engines: what generates rollouts."""

from lit_specrl.engines.base import RolloutEngine
from lit_specrl.engines.transformers_engine import TransformersEngine
from lit_specrl.engines.vllm.engine import VLLMEngine

__all__ = ["RolloutEngine", "TransformersEngine", "VLLMEngine"]
