"""SPEC-RL for one request: find cached responses, verify, take the prefixes, store the new responses.

Of rows with an environment the first turn alone is kept and reused: what was said behind an observation belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_specrl.metrics import merge
from lit_specrl.prefix_cache.acceptance import AcceptanceRule
from lit_specrl.prefix_cache.row_data import data_digest
from lit_specrl.prefix_cache.statistics import ReuseStatistics
from lit_specrl.prefix_cache.store import CachedRollout
from lit_specrl.seeds import row_uniforms
from lit_specrl.types import KnownRow, PromptBatch, RolloutRequest, Rollouts

ScoreResponses = Callable[
    [PromptBatch, Sequence[int], Sequence[Sequence[int]], Callable[[Tensor, int, Tensor], Tensor] | None], list[Tensor]
]
"""(prompts, prompt of each response, responses, rows to keep scoring after a block) -> log-probs of each response.

See `RLVRModule.response_logprobs`.
"""


class ReuseRound:
    """One request of a step: its cached responses, the result of their verification, and the rollouts.

    Args:
        request: the request.
        cached: [N] responses that rows may begin with; `None` where one is answered afresh.
        rule: what is kept of them.
        limits: [N] most tokens that are kept of each; `None` for no limits.
        num_equal: [N] `CachedRollout.num_equal` at the last visit; `None` for zeros.
    """

    def __init__(
        self,
        request: RolloutRequest,
        cached: list[CachedRollout | None],
        rule: AcceptanceRule,
        limits: Sequence[int] | None = None,
        num_equal: Sequence[int] | None = None,
    ) -> None:
        self.request = request
        self.cached = cached
        self._num_equal = num_equal or [0] * len(cached)
        self.rollouts: Rollouts
        self.target_logprobs: dict[int, Tensor] = {}  # of verified cached responses, by row
        self.dropped_logprobs: dict[int, Tensor] = {}  # of rows that are not trained on, by row
        self._rule = rule
        limit = request.sampling.max_completion_length
        present = {row: found for row, found in enumerate(cached) if found is not None}
        self._rows = list(present)
        self._position = {row: position for position, row in enumerate(present)}
        cuts = [limit if limits is None else min(limit, limits[row]) for row in present]
        rows = list(zip(present.values(), cuts, strict=True))
        self._ids = [response.token_ids[:cut].tolist() for response, cut in rows]
        self._previous_logprobs, self._mask = _padded(
            [response.previous_logprobs[:cut] for response, cut in rows]
        )  # [n, R]
        self._generation_logprobs, _ = _padded([response.generation_logprobs[:cut] for response, cut in rows])
        self._scored = torch.full_like(self._previous_logprobs, torch.nan)  # [n, R] blocks of `verify` so far
        self._uniforms = row_uniforms([request.seeds[row] for row in present], self._mask.shape[1], "acceptance")

    def verify(self, score: ScoreResponses) -> None:
        """Find the verified prefix of each cached response.

        Args:
            score: log-probs of responses under the current policy, block by block until a rejection.
        """
        target_logprobs = self._previous_logprobs
        if self._rule.needs_logprobs:
            owners = [self.request.prompt_index(row) for row in self._rows]
            # also without cached responses: sharded ranks meet in every pass
            scored = score(self.request.prompts, owners, self._ids, self._keep_scoring)
            self.target_logprobs = dict(zip(self._rows, scored, strict=True))
            target_logprobs, _ = _padded([logprobs.numpy() for logprobs in scored])
        lengths = self._accepted(torch.arange(len(self._rows)), target_logprobs).tolist()
        self.request.prefixes = [[] for _ in range(self.request.num_rows)]
        for row, token_ids, length in zip(self._rows, self._ids, lengths, strict=True):
            self.request.prefixes[row] = token_ids[:length]

    def verify_in_engine(self, block_length: int) -> None:
        """Let the engine verify, and go on with each row as soon as it is verified.

        Args:
            block_length: tokens of a cached response that are scored at a time.
        """

        def accept(row: int, logprobs: list[float]) -> int:
            found, position = torch.tensor(logprobs), self._position[row]
            unknown = len(self._ids[position]) - len(logprobs)
            self.target_logprobs[row] = torch.nn.functional.pad(found, (0, unknown), value=torch.nan)
            return int(self._accepted(torch.tensor([position]), found[None]))

        self.request.cached_responses = dict(zip(self._rows, self._ids, strict=True))
        self.request.accept, self.request.verify_block_length = accept, block_length

    def _accepted(self, rows: Tensor, target_logprobs: Tensor) -> Tensor:
        """Leading tokens that are kept of the beginnings of cached responses, [m].

        Args:
            rows: [m] among the rows with a cached response.
            target_logprobs: [m, b] of the first b tokens.
        """
        cut = rows, slice(target_logprobs.shape[1])
        return self._rule(
            target_logprobs,
            self._previous_logprobs[cut],
            self._generation_logprobs[cut],
            self._mask[cut],
            self._uniforms[cut],
        )

    def _keep_scoring(self, rows: Tensor, start: int, target_logprobs: Tensor) -> Tensor:
        own, stop = rows.cpu(), start + target_logprobs.shape[1]
        self._scored[own, start:stop] = target_logprobs.cpu()
        kept = self._accepted(own, self._scored[own, :stop])
        return (kept == self._mask[own, :stop].sum(-1)).to(rows.device)

    @property
    def verified_lengths(self) -> list[int]:
        """Tokens taken over, [N]."""
        return [len(self.request.prefix(row)) for row in range(self.request.num_rows)]

    @property
    def expected_lengths(self) -> list[int]:
        """Tokens that each row will probably still need, [N].

        The rest of its cached response, or the mean length of the cached responses.
        """
        lengths = [len(cached) for cached in self.cached if cached is not None]
        mean = sum(lengths) // max(1, len(lengths))
        return [
            mean if cached is None else len(cached) - length
            for cached, length in zip(self.cached, self.verified_lengths, strict=True)
        ]

    def is_complete(self, row: int) -> bool:
        """Whether the whole response was taken over."""
        return 0 < len(self.request.prefix(row)) == len(self.rollouts.response_ids[row])

    def known_rows(self, reuse_rewards: bool, scored_by_policy: bool) -> list[KnownRow | None]:
        """Values that need not be computed again, [N]."""
        return [
            self._known(row, cached, reuse_rewards, scored_by_policy)
            if cached is not None and self.is_complete(row)
            else None
            for row, cached in enumerate(self.cached)
        ]

    def _known(self, row: int, cached: CachedRollout, reuse_rewards: bool, scored_by_policy: bool) -> KnownRow:
        length = len(self.request.prefix(row))
        whole = length == len(cached)
        return KnownRow(
            policy_logprobs=self.target_logprobs[row][:length].numpy()
            if scored_by_policy and row in self.target_logprobs
            else None,
            rewards=cached.reward_values if reuse_rewards and whole else None,
            reference_logprobs=None if cached.reference_logprobs is None else cached.reference_logprobs[:length],
        )

    def score_dropped_rows(self, score: ScoreResponses, trained: set[int]) -> None:
        """Log-probs of the rows that no update will see.

        Args:
            score: as for `verify`.
            trained: seeds of the rows that one will see.
        """
        dropped = [row for row, seed in enumerate(self.request.seeds) if seed not in trained]
        whole = {
            row: self.target_logprobs[row] for row in dropped if self.is_complete(row) and row in self.target_logprobs
        }
        rest = [row for row in dropped if row not in whole]
        owners = [self.request.prompt_index(row) for row in rest]
        scored = score(self.request.prompts, owners, [self.rollouts.response_ids[row] for row in rest], None)
        self.dropped_logprobs = whole | dict(zip(rest, scored, strict=True))

    def cached_rows(
        self, step: int, position: dict[int, int], recorded: NDArray[Any], reference: NDArray[Any] | None
    ) -> Iterator[CachedRollout]:
        """The rows as they are kept.

        Args:
            step: training step.
            position: row of the experience that a seed belongs to.
            recorded: [N, R] log-probs of the experience under the policy that the step began with.
            reference: [N, R] its reference log-probs.
        """
        size = self.request.sampling.num_generations
        num_equal = self._new_num_equal()
        data = [data_digest(self.request.prompts, index) for index in range(len(self.request.prompts))]
        for row, whole in enumerate(self.rollouts.response_ids):
            token_ids = whole[: self._first_turn_length(row)]
            is_whole = len(token_ids) == len(whole)
            at, cached, length = position.get(self.request.seeds[row]), self.cached[row], len(self.request.prefix(row))
            if self.request.accept is not None:  # both sides of the next ratio must come from the engine
                logprobs = np.array(self.rollouts.sampling_logprobs[row][: len(token_ids)], np.float32)
                if row in self.target_logprobs:
                    logprobs[:length] = self.target_logprobs[row][:length].numpy()
            elif at is not None:
                logprobs = recorded[at, : len(token_ids)]
            elif row in self.dropped_logprobs:
                logprobs = self.dropped_logprobs[row].numpy()[: len(token_ids)]
            else:
                logprobs = np.full(len(token_ids), np.nan, np.float32)
            generation_logprobs = logprobs.copy()
            if cached is not None:
                generation_logprobs[:length] = cached.generation_logprobs[:length]
            yield CachedRollout(
                uid=self.request.prompts.uids[self.request.prompt_index(row)],
                sample=row % size,
                token_ids=np.array(token_ids),
                previous_logprobs=logprobs,
                generation_logprobs=generation_logprobs,
                finish_reason="length" if is_whole and self.rollouts.finish_reasons[row] == "length" else "stop",
                policy_version=self.request.policy_version,
                step=step,
                num_reuses=0 if cached is None else cached.num_reuses + 1,
                num_equal=num_equal[row // size],
                reward=self.rollouts.total_rewards[row],
                reward_values={name: values[row] for name, values in self.rollouts.rewards.items()}
                if is_whole
                else None,
                reference_logprobs=None if reference is None or at is None else reference[at, : len(token_ids)],
                data=data[self.request.prompt_index(row)],
            )

    def _first_turn_length(self, row: int) -> int:
        episodes, token_ids = self.rollouts.episodes, self.rollouts.response_ids[row]
        return episodes[row].first_turn_length if episodes else len(token_ids)

    def _new_num_equal(self) -> list[int]:
        """`CachedRollout.num_equal` of each group, [B]."""
        return [
            next_num_equal(
                max(self._num_equal[rows]), self.rollouts.total_rewards[rows], any(self.verified_lengths[rows])
            )
            for rows in self._groups
        ]

    def statistics(self, step: int) -> ReuseStatistics:
        """What was reused; `step` is the current one."""
        verified_lengths = self.verified_lengths
        offered = {row: len(ids) for row, ids in zip(self._rows, self._ids, strict=True)}
        offered_lengths = [offered.get(row, 0) for row in range(self.request.num_rows)]
        return merge(
            [
                ReuseStatistics.of_group(
                    step,
                    self.cached[rows],
                    verified_lengths[rows],
                    self.rollouts.policy_lengths[rows],
                    [self.target_logprobs.get(row) for row in range(rows.start, rows.stop)],
                    self.rollouts.total_rewards[rows],
                    offered_lengths[rows],
                )
                for rows in self._groups
            ]
        )

    @property
    def _groups(self) -> list[slice]:
        size = self.request.sampling.num_generations
        return [slice(start, start + size) for start in range(0, len(self.cached), size)]


def next_num_equal(before: int, rewards: Sequence[float | None], reused: bool) -> int:
    """Times in a row that a group was answered afresh with equal rewards.

    Args:
        before: the number at the last visit.
        rewards: [G] of the group now; equal are those that are all known and the same.
        reused: whether a row of the group began with an earlier response, which says nothing new.

    Example:
        >>> next_num_equal(1, [0.0, 0.0], reused=False), next_num_equal(1, [0.0, 0.0], reused=True)
        (2, 1)
    """
    equal = None not in rewards and len(set(rewards)) == 1
    return before + (not reused) if equal else 0


def control_samples(seeds: Sequence[int], fraction: float) -> set[int]:
    """Samples of a group that are generated afresh: others in every step, because seeds are.

    Args:
        seeds: [G] of the group's rows.
        fraction: share of them; at least one where it is positive and the group has several, and never all of those.

    Example:
        >>> control_samples([31, 12, 77, 54], 0.25)
        {1}
    """
    if not fraction:
        return set()
    if len(seeds) == 1:
        return {0} if float(row_uniforms(seeds, 1, "control")) < fraction else set()
    count = min(
        max(1, round(fraction * len(seeds))), len(seeds) - 1
    )  # reused and fresh rows are compared within a group
    return set(sorted(range(len(seeds)), key=lambda sample: seeds[sample])[:count])


def _padded(rows: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Ragged rows of log-probs as a rectangle [n, R] and its mask."""
    if not rows:
        return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool)
    lengths = [len(row) for row in rows]
    values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return values, torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
