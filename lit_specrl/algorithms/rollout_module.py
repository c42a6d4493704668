"""Generation and evaluation: everything of the module that does not learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoConfig, AutoTokenizer

from lit_specrl.algorithms.evaluation import AccuracyMeter
from lit_specrl.answers import extract_answer
from lit_specrl.checkpoints.checkpoint_io import AtomicCheckpointIO
from lit_specrl.engines import RolloutEngine, TransformersEngine, VLLMEngine
from lit_specrl.models.model_files import check_tokenizer, check_weights
from lit_specrl.models.policy import Policy, check_model_exists, unreachable_model_message
from lit_specrl.rewards import Reward, RewardSet
from lit_specrl.seeds import rollout_seeds
from lit_specrl.timing import StageTimer
from lit_specrl.types import PromptBatch, RolloutProgress, RolloutRequest, Rollouts, SamplingConfig


class RolloutModule(L.LightningModule):
    """A policy that generates through an engine and is scored by rewards: validation, test and prediction.

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward; the first one decides what counts as correct.
        sampling: how to sample in training.
        eval_sampling: how to sample elsewhere, where the data module does not say.
        seed: seed of the rollouts.
    """

    def __init__(
        self,
        model: str,
        rewards: Sequence[Reward | Callable[..., Any] | str],
        sampling: SamplingConfig,
        eval_sampling: SamplingConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.model_name = model
        self.rewards = RewardSet(list(rewards))
        self.sampling = sampling
        self.eval_sampling = eval_sampling
        self.seed = seed
        self.policy: Policy | None = None
        self.engine: RolloutEngine | None = None
        self._engine_started = False
        self.step = 0
        self.policy_version = 0
        self.timer = StageTimer()
        self.evaluation: dict[str, float] = {}  # of the latest validation or test, as logged
        self._meters: dict[int, AccuracyMeter] = {}

    # ---------------------------------------------------------------------------------------------------------- set-up

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the policy; read without its weights."""
        check_model_exists(self.model_name)
        check_tokenizer(self.model_name)
        try:
            return AutoTokenizer.from_pretrained(self.model_name)
        except OSError as error:
            raise ValueError(unreachable_model_message(self.model_name)) from error

    def setup(self, stage: str) -> None:
        self._write_whole_checkpoints()
        self.check_run(stage)

    def check_run(self, stage: str) -> None:
        """Whether module, trainer and data fit each other, before anything is loaded.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: the model cannot be had, or is not whole.
            MisconfigurationException: they do not fit.
        """
        check_model_exists(self.model_name)
        check_weights(self.model_name)
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.engine, VLLMEngine):
            raise MisconfigurationException(
                "TransformersEngine cannot generate with sharded weights; add SpeculativeRollout(engine=VLLMEngine()), or "
                "use strategy='ddp'"
            )
        positions = AutoConfig.from_pretrained(self.model_name).get_text_config().max_position_embeddings
        if self.max_length is not None and self.max_length > positions:
            raise MisconfigurationException(
                f"prompts and responses of up to {self.max_length} tokens do not fit the {positions} positions of "
                f"{self.model_name}; lower max_prompt_length or max_completion_length"
            )

    def _write_whole_checkpoints(self) -> None:
        strategy = self.trainer.strategy
        writer = strategy.checkpoint_io
        if type(writer) is TorchCheckpointIO:  # the default
            strategy.checkpoint_io = AtomicCheckpointIO()
        elif isinstance(writer, AsyncCheckpointIO) and type(writer.checkpoint_io) is TorchCheckpointIO:
            writer._checkpoint_io = AtomicCheckpointIO()  # its setter takes the first one alone

    @property
    def max_length(self) -> int | None:
        """Longest prompt plus response of the run, in tokens; `None` where the data does not bound its prompts."""
        data = self._datamodule
        prompt_length = getattr(data, "max_prompt_length", None)
        if prompt_length is None:
            return None
        samplings = [self.sampling, self.eval_sampling, *getattr(data, "sampling", {}).values()]
        return prompt_length + max(sampling.max_completion_length for sampling in samplings if sampling)

    def teardown(self, stage: str) -> None:
        self.rewards.close()
        self.stop_engine()

    def stop_engine(self) -> None:
        """Shut the engine down; the next rollout starts it again."""
        if self.engine is not None and self._engine_started:
            self.engine.shutdown()
        self._engine_started = False

    # ------------------------------------------------------------------------------------------------------ generation

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str) -> Rollouts:
        """Sample responses under the current policy.

        Args:
            prompts: B prompts.
            sampling: how to sample; G per prompt.
            purpose: what the rollouts are for; decides their seeds, see `rollout_seeds`.
        """
        seeds = rollout_seeds(self.seed, purpose, prompts.uids, sampling.num_generations)
        request = RolloutRequest(prompts, sampling, seeds, self.policy_version)
        self._hook("on_rollout_start", request)
        engine = self.current_engine()
        with self.timer("gen"):
            rollouts = engine.generate(request, on_progress=self._report_progress)
            rollouts.texts = self.tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
        self._hook("on_rollout_end", rollouts)
        return rollouts

    def score(self, rollouts: Rollouts) -> dict[str, float]:
        """Ask every reward about every row whose rewards are not known already; the answers go into `rollouts`.

        Returns:
            What the rewards count, such as `rewards/math/timeouts`.
        """
        prompts, request = rollouts.prompts, rollouts.request
        names = [reward.name for reward in self.rewards.rewards]
        known = {
            row: found.rewards
            for row, found in enumerate(rollouts.known)
            if found is not None and found.rewards is not None and list(found.rewards) == names
        }
        rows = [row for row in range(rollouts.num_rows) if row not in known]
        owners = [request.prompt_index(row) for row in rows]
        column_names = {name for columns in prompts.columns for name in columns}
        columns: dict[str, list[Any]] = {
            name: [prompts.columns[owner].get(name) for owner in owners] for name in column_names
        }
        with self.timer("reward"):
            scores = self.rewards(
                [prompts.prompts[owner] for owner in owners],
                [rollouts.texts[row] for row in rows],
                **columns
                | {
                    "answer": [prompts.answers[owner] for owner in owners],
                    "source": [prompts.sources[owner] for owner in owners],
                    "completion_ids": [rollouts.response_ids[row] for row in rows],
                    "finish_reason": [rollouts.finish_reasons[row] for row in rows],
                },
            )
        asked = zip(rows, zip(*scores.values, strict=True), strict=True)
        answers = known | {row: dict(zip(names, values, strict=True)) for row, values in asked}
        entries = [answers[row] for row in range(rollouts.num_rows)]
        rollouts.rewards = {name: [entry[name] for entry in entries] for name in names}
        rollouts.total_rewards = [self.rewards.total([entry[name] for name in names]) for entry in entries]
        return scores.metrics

    # ------------------------------------------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._meters = {}

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"validation/{self.step}", self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation()

    def on_test_epoch_start(self) -> None:
        self._meters = {}

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"test/{self.step}", self.trainer.test_dataloaders)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation()

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Responses to the prompts of a batch, as one record per row."""
        rollouts = self.generate(batch, batch.sampling or self.eval_sampling, purpose=f"predict/{self.step}")
        return [
            {
                "uid": batch.uids[owner],
                "source": batch.sources[owner],
                "prompt": batch.prompts[owner],
                "answer": batch.answers[owner],
                "completion": rollouts.texts[row],
                "completion_length": len(rollouts.response_ids[row]),
                "finish_reason": rollouts.finish_reasons[row],
            }
            for row in range(rollouts.num_rows)
            for owner in [rollouts.request.prompt_index(row)]
        ]

    def _evaluate(self, batch: PromptBatch, purpose: str, loaders: Any) -> None:
        sampling = batch.sampling or self.eval_sampling
        rollouts = self.generate(batch, sampling, purpose)
        self.score(rollouts)
        correct = rollouts.rewards[self.rewards.rewards[0].name]
        size = sampling.num_generations
        if size not in self._meters:
            self._meters[size] = AccuracyMeter(self._sources(loaders), size).to(self.device)
        answer_format = getattr(self.rewards.rewards[0], "answer_format", "text")
        for index, source in enumerate(batch.sources):
            rows = range(index * size, (index + 1) * size)
            self._meters[size].update(
                source,
                correct=[correct[row] or 0.0 for row in rows],
                answers=[extract_answer(rollouts.texts[row], answer_format) for row in rows],
            )
        self.timer.pop()  # evaluation is not part of the next step

    def _sources(self, loaders: Any) -> list[str]:
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        return sorted({source for loader in loaders for source in loader.sources})

    def _log_evaluation(self) -> None:
        metrics = {name: value for meter in self._meters.values() for name, value in meter.compute().items()}
        if not self.trainer.sanity_checking:
            self.log_dict(metrics, sync_dist=True)  # equal on all ranks already
        elif self.logger is not None and self.trainer.num_sanity_val_batches == self.trainer.num_val_batches:
            # a whole validation before training (num_sanity_val_steps=-1), which Lightning itself would throw away
            self.logger.log_metrics(metrics, step=0)
        self.evaluation = metrics

    # --------------------------------------------------------------------------------------------------------- helpers

    @property
    def device(self) -> torch.device:
        """Where the policy computes, also where its weights wait on the host."""
        with suppress(RuntimeError):  # without a trainer
            if getattr(self.trainer.strategy, "cpu_offload", False):
                return self.trainer.strategy.root_device
        return super().device

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def current_engine(self) -> RolloutEngine:
        """The engine, started and holding the weights of the current policy."""
        assert self.policy is not None
        if self.engine is None:
            self.engine = TransformersEngine()
        if not self._engine_started:
            with self.timer("start_engine"):
                stop_token_ids = self.policy.eos_token_ids | {self.tokenizer.eos_token_id} - {None}
                max_length = self.max_length or self.policy.model.config.get_text_config().max_position_embeddings
                self.engine.start(self.policy, self.model_name, max_length, stop_token_ids)
            self._engine_started = True
        if self.engine.policy_version != self.policy_version:
            with self.timer("update_weights"):
                self.engine.load_policy(self.policy, self.policy_version)
        return self.engine

    def _hook(self, name: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, name, None)  # as Lightning calls its own
            if hook is not None:
                hook(self.trainer, self, *arguments)

    def _report_progress(self, progress: RolloutProgress) -> None:
        self._hook("on_rollout_progress", progress)
