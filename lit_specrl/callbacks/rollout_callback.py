"""Lightning's Callback with hooks around rollouts."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.experience import Experience
from lit_specrl.types import RolloutProgress, RolloutRequest, Rollouts

C = TypeVar("C", bound=L.Callback)


class RolloutCallback(L.Callback):
    """A callback that proposes to, or observes, the rollouts of a step.

    The hooks come in the order in which they stand here. Rollouts of training and of evaluation both pass through them;
    `trainer.training` tells which.

    What a callback may use of the module, besides Lightning's own:

    - from `setup` on: `model_name`, `sampling`, `eval_sampling`, `tokenizer`, `rewards`, `max_length`, `is_sharded`;
      `engine`, which may be replaced there;
    - from the first hook of training or evaluation on: `policy`, `scorer` (log-probs of given responses; its `observer`
      sees the passes of the updates), `current_engine()`, `generate(...)`;
    - within a step: `step` and `policy_version` of its beginning, `step_metrics` (add to it, it is logged behind the
      step), `timer` (measures a stage of the step), and from `on_experience_end` on `trained_rows(...)`;
    - behind an evaluation: `evaluation`.
    """

    def describe(self, trainer: L.Trainer) -> dict[str, str]:
        """Rows of the table of the run (`RunPlan`), before anything is loaded."""
        return {}

    def memory(self, trainer: L.Trainer, num_parameters: int) -> dict[str, int]:
        """Bytes on the device of a rank, by purpose, as far as they are known before the run.

        Args:
            trainer: of the run.
            num_parameters: of the policy.
        """
        return {}

    def charts(self) -> dict[str, dict[str, list[Any]]]:
        """Tabs of TensorBoard (`LoggerReport`): tab -> chart -> kind and names of its curves."""
        return {}

    def on_stage_start(self, trainer: L.Trainer, pl_module: RLVRModule, stage: str) -> None:
        """Called when a stage of a step begins, such as `update_weights`; names as in the metrics `timing_s/NAME`."""

    def on_stage_progress(
        self, trainer: L.Trainer, pl_module: RLVRModule, stage: str, num_done: int, num_parts: int
    ) -> None:
        """Called behind each micro-batch of an update: how many of the stage are done, and of how many."""

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        """Called before the engine sees the request; may change it."""

    def on_rollout_progress(self, trainer: L.Trainer, pl_module: RLVRModule, progress: RolloutProgress) -> None:
        """Called about twice a second while the engine generates."""

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        """Called when all rows are generated and decoded."""

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        """Called in training when rewards, advantages and the log-probs of the step are known, before the update."""


def require_rlvr_module(callback: L.Callback, pl_module: L.LightningModule) -> RLVRModule:
    """The module, if it is one that this library's callbacks work with.

    Raises:
        MisconfigurationException: it is another LightningModule.
    """
    if not isinstance(pl_module, RLVRModule):
        raise MisconfigurationException(
            f"{type(callback).__name__} works with an RLVRModule such as GRPO, got {type(pl_module).__name__}"
        )
    return pl_module


def callbacks_of(trainer: L.Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a class."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def require_only_one(callback: L.Callback, trainer: L.Trainer) -> None:
    """Refuse a second callback of this class.

    Raises:
        MisconfigurationException: there are several.
    """
    same = callbacks_of(trainer, type(callback))
    if len(same) > 1:
        raise MisconfigurationException(f"the trainer has {len(same)} callbacks {type(callback).__name__}; leave one")
