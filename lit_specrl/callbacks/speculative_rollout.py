"""The colocated engine of a run, and its drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.algorithms.run_checks import max_rows_of_run
from lit_specrl.algorithms.streak_warning import StreakWarning
from lit_specrl.callbacks.prefix_cache import PrefixCache
from lit_specrl.callbacks.rollout_callback import RolloutCallback, callbacks_of, require_only_one, require_rlvr_module
from lit_specrl.callbacks.run_plan import memory_of_a_rank
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.drafting import Drafter
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines import RolloutEngine, TransformersEngine, VLLMEngine
from lit_specrl.engines.vllm.version import installed_version
from lit_specrl.experience import Experience
from lit_specrl.models.memory import model_size
from lit_specrl.models.pretrained import check_model_exists
from lit_specrl.types import Rollouts


class SpeculativeRollout(RolloutCallback):
    """Gives the module a colocated engine, and owns its life and its drafter.

    The engine starts with the first rollout, takes over the policy's weights whenever they have changed, sleeps while
    the policy trains, and is shut down at the end of the run or on an exception. Without this callback the module
    generates with `TransformersEngine`.

    With a drafter the engine speculates: several tokens are proposed for each row and verified in one step. What is
    sampled has the policy's distribution, at any temperature and whatever is proposed. Under a drafter that looks
    tokens up (`NGramDrafter`, `HistoryDrafter`) on a CPU the rollouts are those without drafts up to rounding:
    log-probs change in their last bits with the number of tokens that are computed at once, so that now and then
    another token is drawn. How many tokens are drafted is constant, unless there is an `AdaptiveScheduler`.

    Args:
        engine: the engine; by default `VLLMEngine` where vLLM is installed and `TransformersEngine` elsewhere.
        drafter: proposes tokens; `None` for no speculation. Only `VLLMEngine` can speculate.

    Raises:
        MisconfigurationException: from `setup`, for a module that does not generate, an engine that cannot speculate,
            or a `HistoryDrafter(siblings=False)` without a `PrefixCache` to look in.
        ValueError: from `setup`, for a drafter that does not fit the policy, and an engine that does not fit the run
            (`VLLMEngine.check_run`).
        ImportError: from `setup`, for `VLLMEngine` without a vLLM that it was tested with.
    """

    def __init__(self, engine: RolloutEngine | None = None, drafter: Drafter | None = None) -> None:
        if engine is None:
            engine = TransformersEngine() if installed_version() is None else VLLMEngine()
        self.engine, self.drafter = engine, drafter
        self._steps: list[DecodeStep] = []
        self._drafts_are_useless = StreakWarning(
            10,
            "less than 5 % of the drafted tokens were accepted in {num_steps} steps: drafting costs more time than it saves. Add "
            "AdaptiveScheduler, which switches it off where it does not pay, or take another drafter",
        )

    def describe(self, trainer: L.Trainer) -> dict[str, str]:
        drafts = (
            ""
            if self.drafter is None
            else f", up to {self.drafter.num_speculative_tokens} tokens by {type(self.drafter).__name__}"
        )
        return {"engine": f"{self.engine.describe(trainer.strategy.root_device)}{drafts}"}

    def memory(self, trainer: L.Trainer, num_parameters: int) -> dict[str, int]:
        num_bytes = self.engine.memory(num_parameters, trainer.strategy.root_device)
        return {"engine": num_bytes} if num_bytes else {}

    def charts(self) -> dict[str, dict[str, list[Any]]]:
        if self.drafter is None:
            return {}
        return {
            "speculation": {
                "tokens a step": ["Multiline", ["speculation/(length|acceptance_length)"]],
                "accepted by position": ["Multiline", ["speculation/accepted_by_position/.*"]],
                "time of a step, measured and predicted": [
                    "Multiline",
                    ["speculation/step_s", "speculation/step_s_predicted"],
                ],
                "gain, measured and predicted": ["Multiline", ["speculation/(measured|predicted)_gain"]],
            }
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = require_rlvr_module(self, pl_module)
        require_only_one(self, trainer)
        if self.drafter is not None:
            self._check_drafter(trainer, self.drafter)
            _check_sampling(trainer, module)
            self.drafter.check(check_model_exists(module.model_name))
        module.engine, self.engine.drafter = self.engine, self.drafter
        device = trainer.strategy.root_device
        data = getattr(trainer, "datamodule", None)
        self.engine.expected_rows = max_rows_of_run(data, trainer.world_size, module.sampling, module.eval_sampling)
        self.engine.check_run(trainer.world_size, module.max_length, device)
        if device.type == "cuda":
            parts = memory_of_a_rank(trainer, module, model_size(module.model_name, module.lora))
            self.engine.training_bytes = sum(size for purpose, size in parts.items() if purpose != "engine")

    def _check_drafter(self, trainer: L.Trainer, drafter: Drafter) -> None:
        if not self.engine.can_speculate:
            raise MisconfigurationException(
                f"this {type(self.engine).__name__} cannot speculate; use SpeculativeRollout(engine=VLLMEngine(), "
                "drafter=...), with tensor_parallel_size=1, or leave the drafter out"
            )
        caches = callbacks_of(trainer, PrefixCache)
        if drafter.needs_past_responses and not caches:
            raise MisconfigurationException(
                f"{type(drafter).__name__} looks for tokens in the responses that a PrefixCache keeps, and with "
                "siblings=False nowhere else; add PrefixCache(), PrefixCache(acceptance='off') to draft from them "
                "without reusing them, or set siblings=True"
            )

    def on_rollout_end(self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts) -> None:
        with pl_module.timer("sleep"):
            self.engine.sleep()
        if trainer.training:
            self._steps += self.engine.decode_steps

    def on_experience_end(
        self, trainer: L.Trainer, pl_module: RLVRModule, rollouts: Rollouts, experience: Experience
    ) -> None:
        steps = [step for rank in gather_objects(self._steps) for step in rank]
        self._steps = []
        if steps:
            metrics = speculation_metrics(steps)
            pl_module.step_metrics |= metrics
            self._drafts_are_useless.update(metrics.get("speculation/acceptance_rate", 1.0) < 0.05)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {} if self.drafter is None else self.drafter.state_dict()
        if state:
            checkpoint["drafter_knowledge"] = {"drafter": type(self.drafter).__name__, "state": state}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("drafter_knowledge")  # 0.1 has none
        if saved is None or self.drafter is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if saved["drafter"] == type(self.drafter).__name__:
            self.drafter.load_state_dict(saved["state"])


def _check_sampling(trainer: L.Trainer, module: RLVRModule) -> None:
    samplings = [module.sampling, module.eval_sampling, *getattr(trainer.datamodule, "sampling", {}).values()]  # type: ignore[attr-defined]
    shares = [sampling.min_p for sampling in samplings if sampling is not None and sampling.min_p]
    if shares:
        raise MisconfigurationException(
            f"vLLM does not verify drafts under min_p={shares[0]}; leave min_p, or the drafter, out"
        )


def speculation_metrics(steps: Sequence[DecodeStep]) -> dict[str, float]:
    """What speculation did in the steps of a rollout.

    `length` and `acceptance_length` are means over rows and steps: tokens drafted, and tokens emitted (1 without
    drafts). `acceptance_rate` is the share of drafted tokens that were accepted, `accepted_by_position/k` the share of
    drafts with a k-th token of which it was. `drafted_by_source/s` and `accepted_by_source/s` are tokens a row and step
    that were read in s (`SOURCES`).

    Example:
        >>> step = DecodeStep(num_active=2, length=2, seconds=0.1, num_tokens=4, drafted=[2, 2], accepted=[1, 1])
        >>> speculation_metrics([step])["speculation/acceptance_length"]
        2.0
    """
    row_steps = sum(step.num_active for step in steps)
    width = max(step.length for step in steps)
    drafted, accepted = (
        [sum(counts[k] for counts in columns if len(counts) > k) for k in range(width)]
        for columns in ([step.drafted for step in steps], [step.accepted for step in steps])
    )
    metrics = {
        "speculation/length": sum(drafted) / row_steps,
        "speculation/acceptance_length": sum(step.num_tokens for step in steps) / row_steps,
        "speculation/active_requests": row_steps / len(steps),
        "speculation/step_s": sum(step.seconds for step in steps) / len(steps),
    }
    if sum(drafted):
        metrics["speculation/acceptance_rate"] = sum(accepted) / sum(drafted)
    for source in sorted({name for step in steps for name in step.by_source}):
        tried, kept = (sum(step.by_source.get(source, (0, 0))[k] for step in steps) for k in (0, 1))
        metrics[f"speculation/drafted_by_source/{source}"] = tried / row_steps
        metrics[f"speculation/accepted_by_source/{source}"] = kept / row_steps
    for position, (tried, kept) in enumerate(zip(drafted, accepted, strict=True), start=1):
        metrics[f"speculation/accepted_by_position/{position}"] = kept / tried
    return metrics
