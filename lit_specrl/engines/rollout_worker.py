"""Rollouts: responses of the current policy, and what the rewards say of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer

from lit_specrl.checkpoints.identity import identity_of, settings_of
from lit_specrl.data.end_of_turn import end_of_turn_id
from lit_specrl.data.template import PromptTemplate
from lit_specrl.engines.base import RolloutEngine
from lit_specrl.engines.episodes import EpisodeBatch, TurnTaking
from lit_specrl.engines.stop_strings import StopStrings
from lit_specrl.engines.transformers_engine import TransformersEngine
from lit_specrl.environments import Environment
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
        self.environment: Environment | None = None
        """What answers between turns; `None` for responses of one turn."""
        self.max_turns = 1
        self.template = PromptTemplate()
        """How observations are written."""
        self._is_started = False
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}  # of the samplings that were asked for
        self._episodes: EpisodeBatch | None = None

    @property
    def scored_by(self) -> str:
        """What the rewards of a response depend on: the rewards, the text that they see, and who answers in it."""
        identity = self.rewards.identity() + ("" if self.skip_special_tokens else "\nspecial tokens kept")
        if self.environment is None:
            return identity
        return f"{identity}\n{identity_of(type(self.environment), settings_of(self.environment))}"

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
                length = self.max_length or self.policy.model.config.get_text_config().max_position_embeddings
                self.engine.start(self.policy, self.model_name, length, self.stop_token_ids())
            self._is_started = True
            rank_zero_info(f"the engine has started in {time.perf_counter() - started_at:.0f} s")
        if self.engine.policy_version != policy_version:
            with self.timer("update_weights"):
                self.engine.load_policy(self.policy, policy_version)
        return self.engine

    def stop_token_ids(self) -> set[int]:
        """Token ids that end a response: those of the model's generation config, of the tokenizer, and the one by which
        the chat template ends a turn.

        (The tokenizer of a base model often names another token than its template writes.)
        """
        assert self.policy is not None
        known = self.policy.eos_token_ids | {self.tokenizer.eos_token_id} - {None}
        of_template = end_of_turn_id(self.tokenizer)
        if of_template is None or of_template in known:
            return known
        token = self.tokenizer.convert_ids_to_tokens(of_template)
        rank_zero_info(
            f"responses also end with {token}, by which the chat template ends a turn; tokenizer and generation config "
            "do not name it"
        )
        return known | {of_template}

    def _text_end(self, sampling: SamplingConfig) -> StopStrings | None:
        stop = sampling.stop_strings
        if stop and stop not in self._stop_strings:
            self._stop_strings[stop] = StopStrings(self.tokenizer, stop)
        return self._stop_strings[stop] if stop else None

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str, policy_version: int) -> Rollouts:
        """Sample responses.

        Args:
            prompts: B prompts.
            sampling: how to sample; G per prompt.
            purpose: what the rollouts are for; decides their seeds, see `rollout_seeds`.
            policy_version: of the current weights.
        """
        self._close_environments()
        with self._abandoning_environments():
            rollouts = self._generate(prompts, sampling, purpose, policy_version)
        return rollouts

    def _generate(self, prompts: PromptBatch, sampling: SamplingConfig, purpose: str, policy_version: int) -> Rollouts:
        if self.environment is not None:
            with self.timer("environment"):
                self._episodes = self._turn_taking(self.environment).begin(prompts, sampling)
            prompts = self._episodes.prompts
        seeds = rollout_seeds(self.seed, purpose, prompts.uids, sampling.num_generations)
        request = RolloutRequest(prompts, sampling, seeds, policy_version, text_end=self._text_end(sampling))
        self.notify("on_rollout_start", request)
        engine = self.current_engine(policy_version)
        on_progress = partial(self.notify, "on_rollout_progress")
        if self._episodes is not None:
            rollouts = self._episodes.play(request, engine, self.timer, on_progress)
        else:
            with self.timer("gen"):
                rollouts = engine.generate(request, on_progress=on_progress)
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
        prompts, said = rollouts.prompts, rollouts.said
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
        with self._abandoning_environments(), self.timer("reward"):
            scores = self.rewards(
                [prompts.prompts[owner] for owner in owners],
                [said[row] for row in rows],
                **columns
                | {
                    "answer": [prompts.answers[owner] for owner in owners],
                    "source": [prompts.sources[owner] for owner in owners],
                    "completion_ids": [rollouts.response_ids[row] for row in rows],
                    "finish_reason": [rollouts.finish_reasons[row] for row in rows],
                    "prompt_messages": [prompts.messages[owner] if prompts.messages else [] for owner in owners],
                }
                | _episode_columns(rollouts, rows),
            )
        self._close_environments()
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

    def _turn_taking(self, environment: Environment) -> TurnTaking:
        assert self.policy is not None
        return TurnTaking(
            environment,
            self.max_turns,
            self.template,
            self.tokenizer,
            self.skip_special_tokens,
            self.max_length,
            self.policy.device,
        )

    def _close_environments(self) -> None:
        """Of the latest rollouts."""
        episodes, self._episodes = self._episodes, None
        if episodes is not None:
            episodes.environments.close()

    @contextmanager
    def _abandoning_environments(self) -> Iterator[None]:
        """Close those of the latest rollouts where something is raised."""
        try:
            yield
        except BaseException:
            episodes, self._episodes = self._episodes, None
            if episodes is not None:
                episodes.environments.abandon()
            raise

    def close(self) -> None:
        """Shut the engine, the environments and the processes of the rewards down, also where one of them raises."""
        with ExitStack() as calls:  # from the last to the first
            calls.callback(self.stop_engine)
            calls.callback(self.rewards.close)
            calls.callback(self._close_environments)

    def abandon(self) -> None:
        """`close` behind an exception, which is the one to be seen: what closing raises is told as a warning."""
        try:
            self.close()
        except Exception as error:
            warnings.warn(f"behind another error: {type(error).__name__}: {error}", stacklevel=2)


def _episode_columns(rollouts: Rollouts, rows: list[int]) -> dict[str, list[Any]]:
    """What rewards are told of the turns; nothing without an environment."""
    if not rollouts.episodes:
        return {}
    episodes = [rollouts.episodes[row] for row in rows]
    return {
        "transcripts": [rollouts.texts[row] for row in rows],
        "turns": [episode.turns for episode in episodes],
        "environment_reward": [episode.reward for episode in episodes],
        "environments": [episode.environment for episode in episodes],
    }
