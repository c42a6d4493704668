"""How many tokens are drafted, solved for the number of active requests while the engine runs."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.callbacks.rollout_callback import RolloutCallback, callbacks_of, require_only_one, require_rlvr_module
from lit_specrl.callbacks.speculative_rollout import SpeculativeRollout
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.drafting import LookUpDrafter
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule
from lit_specrl.experience import Experience
from lit_specrl.types import RolloutRequest, Rollouts

ON, OFF = 0.0, 1.0
"""`speculation/off_reason`: speculation is on, or the drafter costs more than it saves at every number of active
requests."""


class AdaptiveScheduler(RolloutCallback):
    """Drafts as many tokens as pay at the present number and age of active requests, and none where none pay.

    ReSpec's solver and scheduler (Chen et al. 2025, arXiv 2510.26475). A few timed steps before the first rollout, then
    every step of the run, teach it how long a step takes; what is accepted teaches it what a draft is worth, early and
    late in responses. While the batch drains, the length that emits the most tokens per second is set in the running
    engine. Where a drafter does not pay it is switched off, and watched in steps that cost no more than
    `probe_fraction` of the time, so that it is used again when it has become better.

    Rollouts have the policy's distribution whatever it decides. Its decisions depend on step times, and log-probs
    change in their last bits with the number of tokens that are computed at once, so that a resumed run is not the same
    to the bit. Under a drafter that samples (`DraftModel`), which tokens are sampled depends on step times, too.

    Args:
        hysteresis: predicted gain, as a fraction, for which a length is left for another.
        probe_fraction: share of the decoding time that may be lost by trying a drafter that is off; 0 for never.
        per_row: under a drafter that looks tokens up, choose a length for each row: by what drafts like its own have
            brought in this row, its group and altogether, by the time of a step as a function of all tokens that it
            verifies, and by how long the row will probably run. False: one length for all rows.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: from `setup`, without a `SpeculativeRollout` that has a drafter.
    """

    def __init__(self, hysteresis: float = 0.03, probe_fraction: float = 0.01, per_row: bool = True) -> None:
        LengthSchedule(1, hysteresis, probe_fraction)  # refuses what is out of range
        self.hysteresis, self.probe_fraction, self.per_row = hysteresis, probe_fraction, per_row
        self.schedule: LengthSchedule | None = None
        self._steps: list[DecodeStep] = []
        self._was_off = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_rlvr_module(self, pl_module)
        require_only_one(self, trainer)
        owners = callbacks_of(trainer, SpeculativeRollout)
        if not owners or owners[0].drafter is None:
            raise MisconfigurationException(
                "AdaptiveScheduler needs something to schedule; give SpeculativeRollout a drafter, such as "
                "NGramDrafter()"
            )
        self.engine = owners[0].engine
        drafter = owners[0].drafter
        if self.schedule is None or self.schedule.max_length != drafter.num_speculative_tokens:
            per_row = self.per_row and isinstance(drafter, LookUpDrafter)
            self.schedule = LengthSchedule(
                drafter.num_speculative_tokens, self.hysteresis, self.probe_fraction, per_row
            )
            self._steps, self._was_off = [], False
        self.engine.speculation_control = self.schedule

    def on_rollout_start(self, trainer: L.Trainer, pl_module: RLVRModule, request: RolloutRequest) -> None:
        assert self.schedule is not None
        if self.schedule.latency.num_steps == 0:
            engine = pl_module.current_engine()
            with pl_module.timer("profile_speculation"):
                self.schedule.profile(engine.profile(request.num_rows))

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        if trainer.training:
            self._steps += self.engine.decode_steps

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        assert self.schedule is not None
        rank_steps = gather_objects([self._gain(step) for step in self._steps])
        steps, self._steps = [step for rank in rank_steps for step in rank], []
        is_off = self.schedule.is_off
        if is_off != self._was_off:
            rank_zero_info(_message(is_off))
        self._was_off = is_off
        if steps:
            measured, predicted, plain = (sum(column) for column in zip(*steps, strict=True))
            pl_module.step_metrics |= {
                "speculation/step_s_predicted": predicted / len(steps),
                "speculation/predicted_gain": plain / predicted,
                "speculation/measured_gain": plain / measured,
            }
        pl_module.step_metrics["speculation/off_reason"] = OFF if is_off else ON

    def _gain(self, step: DecodeStep) -> tuple[float, float, float]:
        """Seconds of a step: measured, predicted, and predicted for the same tokens without drafts."""
        assert self.schedule is not None
        predicted, plain = self.schedule.predict(step)
        return step.seconds + step.catch_up_s, predicted, plain * step.num_tokens / step.num_active

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self.schedule is not None
        checkpoint["adaptive_scheduler"] = self.schedule.state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("adaptive_scheduler")
        if state is not None and trainer.state.fn == TrainerFn.FITTING:
            assert self.schedule is not None
            self.schedule.load_state_dict(state)


def _message(is_off: bool) -> str:
    if is_off:
        return (
            "AdaptiveScheduler has switched speculation off: at no number of active requests does the drafter save "
            "more time than it takes. It goes on again when the drafter gets better"
        )
    return "AdaptiveScheduler has switched speculation on: the drafter pays"
