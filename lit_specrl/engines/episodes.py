"""Rollouts of several turns: the engine generates a turn of all rows at once, then their environments answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash

from lit_specrl.data.template import PromptTemplate
from lit_specrl.distributed.collectives import max_over_ranks
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep
from lit_specrl.engines.base import ProgressListener, RolloutEngine
from lit_specrl.engines.row_environments import RowEnvironments
from lit_specrl.environments import Environment, Observation
from lit_specrl.seeds import turn_seed
from lit_specrl.timing import StageTimer
from lit_specrl.types import (
    Episode,
    FinishReason,
    PromptBatch,
    RolloutProgress,
    RolloutRequest,
    Rollouts,
    SamplingConfig,
)

_BEGUN = "+"  # in the identity of a prompt, before a digest of what an environment has added to it


@dataclass(frozen=True)
class TurnTaking:
    """How the turns of a row follow each other.

    Args:
        environment: is copied for every row.
        max_turns: most turns of the policy.
        template: writes observations.
        tokenizer: of the policy.
        skip_special_tokens: decode what the policy says without special tokens.
        max_length: longest prompt plus response of the run, in tokens; `None` for no bound.
        device: where ranks exchange numbers.
    """

    environment: Environment
    max_turns: int
    template: PromptTemplate
    tokenizer: Any
    skip_special_tokens: bool = True
    max_length: int | None = None
    device: torch.device | None = None

    def begin(self, prompts: PromptBatch, sampling: SamplingConfig) -> EpisodeBatch:
        """Reset an environment for every row.

        Args:
            prompts: B prompts.
            sampling: how to sample; G rows per prompt.

        Raises:
            ValueError: what the environments say first differs within a group, or does not fit.
            TypeError: it is no text.
            RuntimeError: an environment raised; names the row, the cause is attached. Whatever is raised, the
                environments are closed.
        """
        environments = RowEnvironments(self.environment, prompts, sampling.num_generations)
        try:
            return EpisodeBatch(self, self._with_observations(prompts, environments.begin(), sampling), environments)
        except BaseException:
            environments.abandon()
            raise

    def _with_observations(
        self, prompts: PromptBatch, observations: Sequence[str | None], sampling: SamplingConfig
    ) -> PromptBatch:
        """The prompts with the first words of their environments, under which they are other prompts."""
        if not any(observations):
            return prompts
        uids, texts, ids = list(prompts.uids), list(prompts.prompts), list(prompts.prompt_ids)
        for index, observation in enumerate(observations):
            if not observation:
                continue
            uids[index] += f"{_BEGUN}{xxhash.xxh3_64_hexdigest(observation.encode())}"
            texts[index] = self.template.with_observation(texts[index], observation, self.tokenizer)
            [ids[index]] = self.template.tokenize([texts[index]], self.tokenizer)
            room = None if self.max_length is None else self.max_length - sampling.max_completion_length
            if room is not None and len(ids[index]) > room:
                raise ValueError(
                    f"the prompt {texts[index][:80]!r} with what {type(self.environment).__name__} says first has "
                    f"{len(ids[index])} tokens, {room} fit; raise max_prompt_length"
                )
        return replace(prompts, uids=uids, prompts=texts, prompt_ids=ids)


@dataclass
class EpisodeBatch:
    """The rows of a request with their environments, turn after turn."""

    turns: TurnTaking
    prompts: PromptBatch
    """[B] with what the environments have said first."""
    environments: RowEnvironments
    _seconds: float = 0.0
    _num_tokens: int = 0
    _steps: list[DecodeStep] = field(default_factory=list)

    def play(
        self, request: RolloutRequest, engine: RolloutEngine, timer: StageTimer, on_progress: ProgressListener
    ) -> Rollouts:
        """Generate turn after turn, until every row has ended.

        Args:
            request: of the first turn.
            engine: holds the weights that the request asks for.
            timer: measures the stages "gen" and "environment".
            on_progress: is told of the tokens of all turns.

        Raises:
            TypeError: an environment has answered something else.
            RuntimeError: an environment raised, or its answer cannot be shown; names the row, the cause is attached.
        """
        rollouts = self._generate(request, engine, timer, on_progress)
        rows = [_Row(list(ids), list(logprobs), [False] * len(ids)) for ids, logprobs in _responses(rollouts)]
        active, turn = list(range(len(rows))), 1
        while True:
            with timer("environment"):
                active = self._answer(rows, active, rollouts.finish_reasons, turn, request)
            if not self._goes_on(active, engine):
                break
            rollouts = self._generate(next_request(request, rows, turn), engine, timer, on_progress)
            for row, (ids, logprobs) in enumerate(_responses(rollouts)):
                rows[row].say(ids, logprobs)
            turn += 1
        engine.decode_steps = self._steps
        return Rollouts(
            request=request,
            response_ids=[row.token_ids for row in rows],
            sampling_logprobs=[row.logprobs for row in rows],
            finish_reasons=[row.end for row in rows if row.end is not None],
            policy_version=request.policy_version,
            elapsed_s=self._seconds,
            episodes=[
                Episode(row.turns, row.observation_mask, row.reward, environment.unwrapped)
                for row, environment in zip(rows, self.environments.of_rows, strict=True)
            ],
        )

    def _generate(
        self, request: RolloutRequest, engine: RolloutEngine, timer: StageTimer, on_progress: ProgressListener
    ) -> Rollouts:
        before, seconds = self._num_tokens, self._seconds

        def tell(progress: RolloutProgress) -> None:
            self._num_tokens = before + progress.num_tokens
            on_progress(replace(progress, num_tokens=self._num_tokens, elapsed_s=seconds + progress.elapsed_s))

        with timer("gen"):
            rollouts = engine.generate(request, on_progress=tell)
        self._seconds += rollouts.elapsed_s
        self._steps += engine.decode_steps
        return rollouts

    def _answer(
        self,
        rows: list[_Row],
        active: list[int],
        reasons: Sequence[FinishReason],
        turn: int,
        request: RolloutRequest,
    ) -> list[int]:
        """Let the environments answer; returns the rows that go on, with an observation at their end."""
        if not active:  # several ranks hold one engine, and another one goes on
            return []
        said = self.turns.tokenizer.batch_decode(
            [rows[row].token_ids[rows[row].turn_start :] for row in active],
            skip_special_tokens=self.turns.skip_special_tokens,
        )
        texts = dict(zip(active, said, strict=True))
        step = [row for row in active if reasons[row] == "stop"]
        answers = self.environments.step({row: texts[row] for row in step})
        for row in active:
            rows[row].turns.append(texts[row])
            if reasons[row] != "stop":
                rows[row].end = reasons[row]
        for row, answer in zip(step, answers, strict=True):
            try:
                self._take_in(rows[row], answer, turn, request.sampling.max_completion_length)
            except Exception as error:  # a role, say, that the chat template does not know
                name = type(self.turns.environment).__name__
                raise RuntimeError(
                    f"what {name}.step has answered cannot be shown: {error}; {self.environments.where(row)}"
                ) from error
        return [row for row in step if rows[row].end is None]

    def _take_in(self, row: _Row, answer: Observation, turn: int, limit: int) -> None:
        """Enter what an environment has answered."""
        if answer.reward is not None:
            row.reward = (row.reward or 0.0) + answer.reward
        if answer.text is None:
            row.end = "stop"
        elif turn == self.turns.max_turns:
            row.end = "turns"
        else:
            ids = self.turns.template.between_turns(
                answer.text, answer.role, self.turns.tokenizer, last_token=row.token_ids[-1]
            )
            if len(row.token_ids) + len(ids) < limit:
                row.observe(ids)
            else:  # no token would be left to say
                row.end = "length"

    def _goes_on(self, active: list[int], engine: RolloutEngine) -> bool:
        """Whether there is a further turn: on any rank, where several hold one engine and must call it together."""
        if engine.generates_together:
            assert self.turns.device is not None
            return max_over_ranks(len(active), self.turns.device) > 0
        return bool(active)


@dataclass
class _Row:
    """A row as it grows."""

    token_ids: list[int]
    logprobs: list[float]
    observation_mask: list[bool]
    turn_start: int = 0
    turns: list[str] = field(default_factory=list)
    reward: float | None = None
    end: FinishReason | None = None

    def say(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Take in a turn: what follows the tokens so far."""
        if self.end is None:
            start = self.turn_start = len(self.token_ids)
            self.token_ids += token_ids[start:]
            self.logprobs += logprobs[start:]
            self.observation_mask += [False] * (len(token_ids) - start)

    def observe(self, token_ids: Sequence[int]) -> None:
        """Take in what stands between two turns."""
        self.token_ids += token_ids
        self.logprobs += [torch.nan] * len(token_ids)
        self.observation_mask += [True] * len(token_ids)


def prompt_of(uid: str) -> str:
    """Identity in the data of a prompt to which an environment may have added something."""
    return uid.partition(_BEGUN)[0]


def next_request(request: RolloutRequest, rows: Sequence[_Row], turn: int) -> RolloutRequest:
    """What the engine is asked for after `turn` turns: each row goes on from its tokens so far, with draws of its
    own."""
    return replace(
        request,
        seeds=[turn_seed(seed, turn) for seed in request.seeds],
        prefixes=[list(row.token_ids) for row in rows],
        ended={number: row.end for number, row in enumerate(rows) if row.end is not None},
        cached_responses={},
        accept=None,
        verify_block_length=None,
        expected_lengths=[],
    )


def _responses(rollouts: Rollouts) -> list[tuple[list[int], list[float]]]:
    return list(zip(rollouts.response_ids, rollouts.sampling_logprobs, strict=True))
