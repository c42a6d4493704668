"""The engines of test_rollout_engines, for the files beside it."""

from test_rollout_engines import colocated, prompts, started

__all__ = ["colocated", "prompts", "started"]
