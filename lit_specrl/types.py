"""The carriers that the stages of one step hand to each other.

Shape legend, used in every docstring of the package:

    B  prompts of this rank in one step        P  prompt tokens (padded length)
    G  rollouts per prompt (the group)         R  response tokens (padded length)
    N  rows, N = B * G; row n answers prompt n // G      V  vocabulary

Ragged data stays in lists; tensors appear where arithmetic on them starts (`lit_specrl.experience`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "turns"]
"""Why a row ended: a token that ends it, the limit of its tokens, or that of its turns."""


def check_at_least_one(**counts: int | None) -> None:
    """Refuse counts below 1, by the names that the user typed; `None` is no count.

    Raises:
        ValueError: the first one.

    Example:
        >>> check_at_least_one(num_passes=6)
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Args:
        num_generations: rollouts per prompt, G.
        max_completion_length: longest response, in tokens.
        temperature: softmax temperature; 0 is greedy decoding.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole vocabulary.
        top_k: number of most likely tokens to sample from; `None` keeps all.
        min_p: least probability of a token that is sampled, as a share of that of the most likely token; 0 keeps all.
        repetition_penalty: logits of tokens of prompt and response are divided by it where they are positive, and
            multiplied where they are negative; 1 changes nothing.
        stop: texts that end a response. It ends with the token that completes one, and tokens and text keep all of it.
        stop_token_ids: further token ids that end a response, beside those of tokenizer, model and chat template.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {self.num_generations}")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1 token, got {self.max_completion_length}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}; use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; use 1.0 to keep the whole vocabulary")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to keep the whole vocabulary")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}; use 0.0 to keep the whole vocabulary")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}; use 1.0 for none")
        if not all(self.stop_strings):
            raise ValueError(f"stop must hold texts that are not empty, got {self.stop!r}")
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids must not be negative, got {self.stop_token_ids}")

    @property
    def is_truncated(self) -> bool:
        """True when sampling departs from the softmax of the policy, as `departure` says."""
        return bool(self.departure)

    @property
    def departure(self) -> str:
        """What makes sampling depart from the softmax of the policy, such as "top_p=0.9 and min_p=0.1", or nothing."""
        softmax = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}
        found = {name: getattr(self, name) for name in softmax}
        return " and ".join(f"{name}={value}" for name, value in found.items() if value != softmax[name])

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, one or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass
class PromptBatch:
    """The prompts of one step on one rank.

    Example: two questions, the first with a numeric answer, the second without a reference::

        PromptBatch(uids=["a1", "b7"], prompt_ids=[[5, 6, 7], [5, 9]], prompts=["2+3=", "Hi"],
                    answers=["5", None], sources=["arithmetic", "chat"])
    """

    uids: list[str]
    """[B] stable row identities: a hash of prompt and answer, made unique among duplicates."""
    prompt_ids: list[list[int]]
    """[B] token ids, ragged, without padding."""
    prompts: list[str]
    """[B] the rendered prompt text that was tokenised."""
    answers: list[str | None]
    """[B] reference answers; `None` where the source has none."""
    sources: list[str]
    """[B] name of the data source of each row; results are reported per source."""
    columns: list[dict[str, Any]] = field(default_factory=list)
    """[B] or empty: the remaining columns of each data row, handed to reward functions."""
    messages: list[list[dict[str, str]]] = field(default_factory=list)
    """[B] or empty: the conversations that the prompts show, turns with `role` and `content`."""
    sampling: SamplingConfig | None = None
    """How to sample for these prompts; `None` means the module's training settings."""

    def __len__(self) -> int:
        return len(self.uids)

    def select(self, indices: Sequence[int]) -> PromptBatch:
        """The prompts at these indices, in that order."""
        chosen: dict[str, Any] = {
            name: [rows[i] for i in indices] if rows else [] for name, rows in vars(self).items() if name != "sampling"
        }
        return replace(self, **chosen)

    def __add__(self, other: PromptBatch) -> PromptBatch:
        """The prompts of both, to be sampled alike."""
        theirs = other._columns()
        joined: dict[str, Any] = {name: rows + theirs[name] for name, rows in self._columns().items()}
        joined["messages"] = _joined(self.messages, other.messages, len(self), len(other), [])
        return replace(self, **joined)

    def _columns(self) -> dict[str, Any]:
        return {
            name: values or [{}] * len(self) if name == "columns" else values
            for name, values in vars(self).items()
            if name != "sampling"
        }

    def to(self, device: Any) -> PromptBatch:
        """Return self: prompts stay on the host (Lightning calls this when it moves a batch)."""
        return self


class TextEnd(Protocol):
    """Finds where the text of a response is complete; see `lit_specrl.engines.stop_strings`."""

    reach: int
    """Tokens before the last one that decide whether it completes the text."""

    def __call__(self, token_ids: Sequence[int], start: int = 0) -> int | None:
        """Tokens up to and including the first, from `start` on, that completes the text, or `None`."""


@dataclass
class Continuation:
    """What an engine adds to the prefix of a row."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


class RowJournal(Protocol):
    """Keeps the rows that a generation has finished, in case it does not come to its end."""

    def find(self, request: RolloutRequest, rows: Sequence[int]) -> dict[int, Continuation]:
        """Those of the rows that were finished before; the engine takes them as they are.

        Args:
            request: what is about to be generated.
            rows: rows that are not complete.
        """

    def keep(self, request: RolloutRequest, finished: Mapping[int, Continuation]) -> None:
        """Receives rows as soon as the engine has finished them."""


@dataclass
class RolloutRequest:
    """What an engine is asked to generate: every prompt G times."""

    prompts: PromptBatch
    sampling: SamplingConfig
    seeds: list[int]
    """[N] one seed per row, drawn from the run's generator; equal seeds give equal responses."""
    policy_version: int
    """Number of optimizer steps behind the weights that shall generate."""
    prefixes: list[list[int]] = field(default_factory=list)
    """[N] or empty: response tokens that a row begins with; the engine goes on from there."""
    cached_responses: dict[int, list[int]] = field(default_factory=dict)
    """Row -> response tokens that the engine verifies first; it enters what `accept` keeps of them into `prefixes`."""
    accept: Callable[[int, list[float]], int] | None = None
    """(row, log-probs of the scored beginning of its cached response under the engine's weights) -> tokens to keep."""
    verify_block_length: int | None = None
    """Tokens of a cached response that the engine scores at a time, as long as all are kept; `None` scores all at
    once."""
    past_responses: Mapping[int, Sequence[int] | NDArray[np.int32]] = field(default_factory=dict)
    """Row -> its response of the last visit, in which a drafter looks for the next tokens; no part of the new one."""
    expected_lengths: list[int] = field(default_factory=list)
    """[N] or empty: tokens that a row will probably still need; where not all rows fit, the longest start first."""
    text_end: TextEnd | None = None
    """Finds the stop strings of `sampling.stop` in the tokens of a response; `None` where there are none."""
    ended: Mapping[int, FinishReason] | None = None
    """Row -> why it has ended in an earlier turn, so that its prefix is the whole response; `None` in a first turn,
    where the prefixes themselves tell."""
    journal: RowJournal | None = None
    """Is told of finished rows, and knows those of an interrupted run."""

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.sampling.num_generations

    def prefix(self, row: int) -> list[int]:
        """Response tokens that `row` begins with."""
        return self.prefixes[row] if self.prefixes else []

    def begun(self, row: int) -> list[int]:
        """Tokens that the present turn of `row` begins with: those of the prefix in the first turn, none in others."""
        return self.prefix(row) if self.ended is None else []

    def prompt_index(self, row: int) -> int:
        """Index into the prompts of the prompt that `row` answers."""
        return row // self.sampling.num_generations

    def answered(self) -> RolloutRequest:
        """The request without what helped to answer it, which goes by the numbers that its rows had then."""
        return RolloutRequest(self.prompts, self.sampling, self.seeds, self.policy_version, self.prefixes)


@dataclass(frozen=True)
class RolloutProgress:
    """How far a running generation has come; engines report it about twice a second."""

    rows_done: int
    num_rows: int
    num_tokens: int
    """Response tokens generated so far."""
    elapsed_s: float


@dataclass(frozen=True)
class KnownRow:
    """What is known of a row that was taken over whole from an earlier step, and need not be computed again."""

    policy_logprobs: NDArray[np.float32] | None = None
    """[R] nats, under the policy that this step begins with; `None` where they were not computed."""
    rewards: dict[str, float | None] | None = None
    """Unweighted rewards by function; `None` where the functions have to be called."""
    reference_logprobs: NDArray[np.float32] | None = None
    """[R] nats, under the reference; `None` where they were not computed."""


@dataclass(frozen=True)
class Episode:
    """The turns of a row with an environment.

    Example: two turns of two tokens each, an observation of three tokens between them::

        Episode(turns=["calc: 2+3", "Answer: 5"], observation_mask=[False] * 2 + [True] * 3 + [False] * 2)
    """

    turns: list[str]
    """What the policy said, turn by turn; decoded as `Rollouts.texts`."""
    observation_mask: list[bool]
    """[R] True on tokens that the environment wrote; a response begins with one of the policy."""
    reward: float | None = None
    """Sum of what the environment gave; `None` where it gave nothing."""
    environment: Any = None
    """The environment of the row, as the last turn has left it."""

    @property
    def num_observation_tokens(self) -> int:
        return sum(self.observation_mask)

    @property
    def first_turn_length(self) -> int:
        """Tokens before the first observation."""
        return next((at for at, observed in enumerate(self.observation_mask) if observed), len(self.observation_mask))


@dataclass
class Rollouts:
    """Generated responses, one row each.

    Example: one prompt, two rows, the second cut at the length limit of 3 tokens::

        Rollouts(request, response_ids=[[8, 2], [8, 8, 8]], sampling_logprobs=[[-0.1, -0.7], [-0.1, -0.2, -0.2]],
                 finish_reasons=["stop", "length"], policy_version=0, elapsed_s=0.4)
    """

    request: RolloutRequest
    response_ids: list[list[int]]
    """[N] ragged token ids, the end-of-text token included when it was generated; with an environment all turns and the
    observations between them."""
    sampling_logprobs: list[list[float]]
    """[N] ragged, nats: log-prob of each token under the distribution it was sampled from (temperature applied); NaN
    for tokens of a prefix and of observations, which this engine did not sample."""
    finish_reasons: list[FinishReason]
    """[N] "stop" = a token that ends a response was generated, or a stop string was completed; "length" = cut at
    `max_completion_length`, "turns" = cut at `max_turns`."""
    policy_version: int
    """Version of the weights that generated."""
    elapsed_s: float
    """Wall time of generation, in seconds."""
    texts: list[str] = field(default_factory=list)
    """[N] decoded responses without special tokens, observations included; filled by the module."""
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    """Unweighted rewards by function, [N] each, `None` where one does not apply; filled by the module."""
    total_rewards: list[float | None] = field(default_factory=list)
    """[N] weighted sum of the rewards that apply, `None` where none does; filled by the module."""
    known: list[KnownRow | None] = field(default_factory=list)
    """[N] or empty: what is known already about a row, `None` for rows that were generated."""
    episodes: list[Episode] = field(default_factory=list)
    """[N] or empty: the turns of each row; empty without an environment."""

    def select_groups(self, groups: Sequence[int]) -> Rollouts:
        """The rows of the prompts at these indices, in that order."""
        size = self.request.sampling.num_generations
        rows = [group * size + sample for group in groups for sample in range(size)]

        def pick(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

        return replace(
            self,
            request=replace(
                self.request,
                prompts=self.prompts.select(groups),
                seeds=pick(self.request.seeds),
                prefixes=pick(self.request.prefixes),
            ).answered(),
            response_ids=pick(self.response_ids),
            sampling_logprobs=pick(self.sampling_logprobs),
            finish_reasons=pick(self.finish_reasons),
            texts=pick(self.texts),
            known=pick(self.known),
            episodes=pick(self.episodes),
            rewards={name: pick(values) for name, values in self.rewards.items()},
            total_rewards=pick(self.total_rewards),
        )

    def __add__(self, other: Rollouts) -> Rollouts:
        """The rows of both, sampled alike; the time is that of both."""
        return replace(
            self,
            request=replace(
                self.request,
                prompts=self.prompts + other.prompts,
                seeds=self.request.seeds + other.request.seeds,
                prefixes=_joined(self.request.prefixes, other.request.prefixes, self.num_rows, other.num_rows, []),
            ).answered(),
            response_ids=self.response_ids + other.response_ids,
            sampling_logprobs=self.sampling_logprobs + other.sampling_logprobs,
            finish_reasons=self.finish_reasons + other.finish_reasons,
            elapsed_s=self.elapsed_s + other.elapsed_s,
            texts=self.texts + other.texts,
            rewards={name: values + other.rewards[name] for name, values in self.rewards.items()},
            total_rewards=self.total_rewards + other.total_rewards,
            known=_joined(self.known, other.known, self.num_rows, other.num_rows, None),
            episodes=self.episodes + other.episodes,
        )

    @property
    def prompts(self) -> PromptBatch:
        return self.request.prompts

    @property
    def num_rows(self) -> int:
        return len(self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rows."""
        return sum(len(ids) for ids in self.response_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that the engine sampled: no part of a prefix, and not those of observations."""
        return sum(self.policy_lengths) - sum(len(prefix) for prefix in self.request.prefixes)

    @property
    def said(self) -> list[str]:
        """[N] what the policy said, decoded; with an environment its turns, joined by line breaks.

        Without observations: an answer that stands in one is none of the policy's.
        """
        return ["\n".join(episode.turns) for episode in self.episodes] if self.episodes else self.texts

    @property
    def policy_lengths(self) -> list[int]:
        """[N] response tokens that the policy said."""
        if not self.episodes:
            return [len(ids) for ids in self.response_ids]
        return [len(episode.observation_mask) - episode.num_observation_tokens for episode in self.episodes]

    @property
    def truncated(self) -> list[bool]:
        """[N] True where the response was cut at the limit of its tokens, or of its turns."""
        return [reason != "stop" for reason in self.finish_reasons]


def _joined(first: list[Any], second: list[Any], num_first: int, num_second: int, absent: Any) -> list[Any]:
    """Two lists behind one another; one that is empty stands for as many absent entries as the other's side has
    rows."""
    if not first and not second:
        return []
    return (first or [absent] * num_first) + (second or [absent] * num_second)
