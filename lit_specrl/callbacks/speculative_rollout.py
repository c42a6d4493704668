"""The colocated engine of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L

from lit_specrl.callbacks.rollout_callback import RolloutCallback, require_rlvr_module
from lit_specrl.rollout import RolloutEngine, TransformersEngine, VLLMEngine
from lit_specrl.rollout.vllm_adapter import check_version, installed_version
from lit_specrl.types import Rollouts

if TYPE_CHECKING:
    from lit_specrl.module import RLVRModule


class SpeculativeRollout(RolloutCallback):
    """Gives the module a colocated engine and owns its life.

    The engine starts with the first rollout, takes over the policy's weights whenever they have changed, sleeps while the policy trains,
    and is shut down at the end of the run or on an exception. Without this callback the module generates with
    `TransformersEngine`.

    Args:
        engine: the engine; by default `VLLMEngine` where vLLM is installed and `TransformersEngine` elsewhere.

    Raises:
        MisconfigurationException: from `setup`, for a module that does not generate.
        ImportError: from `setup`, for `VLLMEngine` without a vLLM that it was tested with.
    """

    def __init__(self, engine: RolloutEngine | None = None) -> None:
        if engine is None:
            engine = TransformersEngine() if installed_version() is None else VLLMEngine()
        self.engine = engine

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_rlvr_module(self, pl_module).engine = self.engine
        if isinstance(self.engine, VLLMEngine):
            check_version()

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        self.engine.sleep()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if getattr(pl_module, "engine", None) is self.engine:  # not so when `setup` has refused the module
            require_rlvr_module(self, pl_module).stop_engine()
