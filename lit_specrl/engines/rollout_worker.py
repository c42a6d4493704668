"""Rollouts: responses of the current policy, and what the rewards say of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer

from lit_specrl.engines.base import RolloutEngine
from lit_specrl.engines.transformers_engine import TransformersEngine
from lit_specrl.models.model_files import check_tokenizer
from lit_specrl.models.model_name import hub_options
from lit_specrl.models.policy import Policy
from lit_specrl.models.pretrained import check_model_exists, unreachable_model_message
from lit_specrl.rewards import RewardSet
from lit_specrl.seeds import rollout_seeds
from lit_specrl.timing import StageTimer
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig

Notify = Callable[..., None]
"""Called with the name of a moment, "on_rollout_start", "on_rollout_progress" or "on_rollout_end", and its subject."""


class RolloutWorker:
    """Owns tokenizer, engine, rewards and seeds; generates responses and scores them.

    Args:
        model: hub name or local folder of the policy.
        rewards: what to reward.
        seed: seed of the rollouts.
        timer: measures the stages.
        notify: is told of the moments of a rollout.
    """

    def __init__(self, model: str, rewards: RewardSet, seed: int, timer: StageTimer, notify: Notify) -> None:
        self.model_name, self.rewards, self.seed = model, rewards, seed
        self.timer, self.notify = timer, notify
        self.engine: RolloutEngine | None = None
        """`None` stands for a `TransformersEngine` that is made with the first rollout."""
        self.policy: Policy | None = None
        """Whose responses; set when the policy is built."""
        self.max_length: int | None = None
        """Longest prompt plus response of the run, in tokens; `None` for as many as the policy has positions."""
        self.skip_special_tokens = True
        """Whether texts of responses are without special tokens."""
        self._is_started = False

    @property
    def scored_by(self) -> str:
        """What the rewards of a response depend on: the rewards, and the text that they see."""
        return self.rewards.identity() + ("" if self.skip_special_tokens else "\nspecial tokens kept")

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the policy; read without its weights."""
        check_model_exists(self.model_name)
        check_tokenizer(self.model_name)
        try:
            return AutoTokenizer.from_pretrained(self.model_name, **hub_options(self.model_name))
        except OSError as error:
            raise ValueError(unreachable_model_message(self.model_name)) from error

    def current_engine(self, policy_version: int) -> RolloutEngine:
        """The engine, started and holding the current weights.

        Args:
            policy_version: of the current weights.
        """
        assert self.policy is not None
        if self.engine is None:
            self.engine = TransformersEngine()
        if not self._is_started:
            rank_zero_info(f"starting the engine: {self.engine.describe(self.policy.device)}")
            started_at = time.perf_counter()
            with self.timer("start_engine"):
                stop_token_ids = self.policy.eos_token_ids | {self.tokenizer.eos_token_id} - {None}
                length = self.max_length or self.policy.model.config.get_text_config().max_position_embeddings
                self.engine.start(self.policy, self.model_name, length, stop_token_ids)
            self._is_started = True
            rank_zero_info(f"the engine has started in {time.perf_counter() - started_at:.0f} s")
        if self.engine.policy_version != policy_version:
            with self.timer("update_weights"):
                self.engine.load_policy(self.policy, policy_version)
        return self.engine

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str, policy_version: int) -> Rollouts:
        """Sample responses.

        Args:
            prompts: B prompts.
            sampling: how to sample; G per prompt.
            purpose: what the rollouts are for; decides their seeds, see `rollout_seeds`.
            policy_version: of the current weights.
        """
        seeds = rollout_seeds(self.seed, purpose, prompts.uids, sampling.num_generations)
        request = RolloutRequest(prompts, sampling, seeds, policy_version)
        self.notify("on_rollout_start", request)
        engine = self.current_engine(policy_version)
        with self.timer("gen"):
            rollouts = engine.generate(request, on_progress=partial(self.notify, "on_rollout_progress"))
            rollouts.texts = self.tokenizer.batch_decode(
                rollouts.response_ids, skip_special_tokens=self.skip_special_tokens
            )
        self.notify("on_rollout_end", rollouts)
        return rollouts

    def score(self, rollouts: Rollouts) -> dict[str, float]:
        """Ask every reward about every row whose rewards are not known already; the answers go into `rollouts`.

        Returns:
            What the rewards count, such as `rewards/math/timeouts`.
        """
        prompts = rollouts.prompts
        names = [reward.name for reward in self.rewards.rewards]
        known = {
            row: found.rewards
            for row, found in enumerate(rollouts.known)
            if found is not None and found.rewards is not None and list(found.rewards) == names
        }
        rows = [row for row in range(rollouts.num_rows) if row not in known]
        owners = [rollouts.request.prompt_index(row) for row in rows]
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

    def stop_engine(self) -> None:
        """Shut the engine down; the next rollout starts it again."""
        if self.engine is not None and self._is_started:
            self.engine.shutdown()
        self._is_started = False

    def close(self) -> None:
        """Shut the engine and the processes of the rewards down."""
        self.rewards.close()
        self.stop_engine()
