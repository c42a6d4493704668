"""From ragged rollouts to the rectangles that the loss works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_specrl.distributed.transfer import moved_together
from lit_specrl.masking import pad_left, pad_right
from lit_specrl.types import Rollouts


class TokenBatch(NamedTuple):
    """Prompts and responses, padded: the input of every forward pass over given tokens."""

    prompt_ids: Tensor
    """[B, P] long, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool, True on prompt tokens."""
    prompt_index: Tensor
    """[N] long, the prompt of each row."""
    response_ids: Tensor
    """[N, R] long, right-padded."""
    response_mask: Tensor
    """[N, R] bool, True on response tokens."""


@dataclass(frozen=True)
class Layout:
    """Which prompt each row answers, and how long both are: integers of the host, from which passes are planned without
    asking a device that is still busy.

    Example: two prompts of two and three tokens, the first with two responses::

        Layout(prompt_index=[0, 0, 1], prompt_lengths=[2, 3], response_lengths=[1, 4, 2])
    """

    prompt_index: list[int]
    """[N] the prompt of each row."""
    prompt_lengths: list[int]
    """[B] tokens of each prompt."""
    response_lengths: list[int]
    """[N] tokens of each response."""

    @classmethod
    def of(cls, batch: TokenBatch) -> Layout:
        """Read it from tensors; waits for the device that they are on."""
        return cls(
            batch.prompt_index.tolist(), batch.prompt_mask.sum(-1).tolist(), batch.response_mask.sum(-1).tolist()
        )

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(self.response_lengths)

    def select(self, rows: Sequence[int]) -> tuple[Layout, list[int]]:
        """Of the given rows, with the prompts that they answer in ascending order; and which prompts these are."""
        prompts = sorted({self.prompt_index[row] for row in rows})
        place = {prompt: number for number, prompt in enumerate(prompts)}
        return Layout(
            prompt_index=[place[self.prompt_index[row]] for row in rows],
            prompt_lengths=[self.prompt_lengths[prompt] for prompt in prompts],
            response_lengths=[self.response_lengths[row] for row in rows],
        ), prompts


@dataclass
class Experience:
    """Rollouts with everything the loss needs, padded.

    Prompts are left-padded and responses right-padded: a response starts at the same column in every row.
    """

    TOKEN_FIELDS: ClassVar[tuple[str, ...]] = (
        "response_ids",
        "response_mask",
        "loss_mask",
        "observation_mask",
        "sampling_logprobs",
        "advantages",
        "old_logprobs",
        "reference_logprobs",
        "recorded_logprobs",
        "kl_penalty",
        "entropy",
        "values",
        "returns",
    )
    """Fields of shape [N, R]."""

    prompt_ids: Tensor
    """[B, P] long, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool, True on prompt tokens."""
    prompt_index: Tensor
    """[N] long, the prompt that each row answers."""
    response_ids: Tensor
    """[N, R] long, right-padded."""
    response_mask: Tensor
    """[N, R] bool, True on response tokens (end-of-text included, and what an environment wrote between turns)."""
    loss_mask: Tensor
    """[N, R] bool, True on tokens that take part in the loss; a subset of `policy_mask`."""
    sampling_logprobs: Tensor
    """[N, R] float32, nats, 0 on padding."""
    rewards: Tensor
    """[N] float32, weighted sum over the reward functions; NaN where none applies."""
    advantages: Tensor
    """[N, R] float32."""
    policy_version: int
    old_logprobs: Tensor | None = None
    """[N, R] float32, nats; `None` when the only update is on-policy and the training forward supplies them."""
    reference_logprobs: Tensor | None = None
    """[N, R] float32, nats; `None` without a KL penalty."""
    recorded_logprobs: Tensor | None = None
    """[N, R] float32, nats, under the policy that this step began with, from whichever pass computed them; NaN where
    none did, 0 on padding."""
    kl_penalty: Tensor | None = None
    """[N, R] float32, what is subtracted from the reward of each token; `None` for nothing."""
    entropy: Tensor | None = None
    """[N, R] float32, nats, of the policy that this step began with; `None` where nothing asks for it."""
    values: Tensor | None = None
    """[N, R] float32, the critic's estimate before each token; `None` without a critic."""
    returns: Tensor | None = None
    """[N, R] float32, the critic's target; `None` without a critic."""
    observation_mask: Tensor | None = None
    """[N, R] bool, True on response tokens that an environment wrote; `None` without an environment."""
    scores: Tensor | None = None
    """[N, K] float32, of each reward function for itself, unweighted; NaN where it does not apply."""
    score_weights: Tensor | None = None
    """[K] float32, weights of the reward functions."""

    @property
    def num_rows(self) -> int:
        return self.response_ids.shape[0]

    @property
    def policy_mask(self) -> Tensor:
        """[N, R] bool, True on response tokens that the policy said."""
        return self.response_mask if self.observation_mask is None else self.response_mask & ~self.observation_mask

    @property
    def row_rewards(self) -> Tensor:
        """[N] rewards less the KL penalty of the row, where it is taken from the reward; NaN where no reward
        applies."""
        return self.rewards if self.kl_penalty is None else self.rewards - self.kl_penalty.sum(-1)

    @property
    def prompt_lengths(self) -> Tensor:
        """[N] prompt tokens of each row."""
        return self.prompt_mask.sum(-1)[self.prompt_index]

    @property
    def response_lengths(self) -> Tensor:
        """[N] response tokens of each row."""
        return self.response_mask.sum(-1)

    @property
    def inputs(self) -> TokenBatch:
        """What policy and critic are given."""
        return TokenBatch(self.prompt_ids, self.prompt_mask, self.prompt_index, self.response_ids, self.response_mask)

    @cached_property
    def layout(self) -> Layout:
        """Prompts and lengths of the rows, on the host."""
        return Layout.of(self.inputs)

    def select(self, rows: list[int]) -> Experience:
        """The given rows with their prompts, padded no further than these rows need."""
        [(_, part)] = self.split([rows])
        return part

    def split(self, parts: Sequence[list[int]]) -> Iterator[tuple[Tensor, Experience]]:
        """`select` of several lists of rows, whose numbers reach the device in one copy.

        Args:
            parts: lists of rows, none of them empty.

        Yields:
            The numbers of the rows, [n] long on the device, and the rows.
        """
        selected = [self.layout.select(rows) for rows in parts]
        numbers = [
            torch.tensor(values)
            for rows, (layout, prompts) in zip(parts, selected, strict=True)
            for values in (rows, prompts, layout.prompt_index)
        ]
        moved = iter(moved_together(numbers, self.response_ids.device))
        for layout, _ in selected:
            rows, prompts, prompt_index = next(moved), next(moved), next(moved)
            yield rows, self._part(rows, prompts, prompt_index, layout)

    def _part(self, rows: Tensor, prompts: Tensor, prompt_index: Tensor, layout: Layout) -> Experience:
        first_column = self.prompt_ids.shape[1] - max(layout.prompt_lengths)
        num_columns = max(layout.response_lengths)
        cut: dict[str, Any] = {
            name: value[rows, :num_columns] for name in self.TOKEN_FIELDS if (value := getattr(self, name)) is not None
        }
        part = replace(
            self,
            **cut,
            prompt_ids=self.prompt_ids[prompts, first_column:],
            prompt_mask=self.prompt_mask[prompts, first_column:],
            prompt_index=prompt_index,
            rewards=self.rewards[rows],
            scores=None if self.scores is None else self.scores[rows],
        )
        part.layout = layout
        return part

    def record_logprobs(self, logprobs: Tensor, rows: Tensor | list[int]) -> None:
        """Enter log-probs under the policy that this step began with.

        Args:
            logprobs: [n, r] nats, r at most R.
            rows: the n rows that they are of, [n] long.
        """
        assert self.recorded_logprobs is not None
        self.recorded_logprobs[rows, : logprobs.shape[1]] = logprobs

    def keep_only(self, groups: Tensor) -> None:
        """Leave the rows of other groups out of the loss.

        Args:
            groups: [B] bool, True for groups that stay.
        """
        self.loss_mask = self.loss_mask & groups[self.prompt_index, None]

    def minibatches(self, count: int, passes: int = 1) -> list[Experience]:
        """`count` parts of equally many whole groups, in order, as often as there are passes."""
        if count == 1:
            return [self] * passes
        num_prompts = len(self.prompt_ids)
        if num_prompts % count:
            raise ValueError(f"{num_prompts} prompts cannot be divided into {count} minibatches")
        parts: list[list[int]] = [[] for _ in range(count)]
        for row, prompt in enumerate(self.layout.prompt_index):
            parts[prompt // (num_prompts // count)].append(row)
        return [part for _, part in self.split(parts)] * passes

    def to(self, device: torch.device | str) -> Experience:
        """Copy with every tensor on `device`, in one copy."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = dict(zip(tensors, moved_together(list(tensors.values()), device), strict=True))
        copy = replace(self, **moved)
        copy.layout = self.layout
        return copy


def padded_rows(
    prompt_ids: Sequence[Sequence[int]],
    prompt_index: Sequence[int],
    response_ids: Sequence[Sequence[int]],
    policy_version: int = 0,
) -> Experience:
    """Pad prompts and responses; log-probs, rewards and advantages are zero.

    Args:
        prompt_ids: [B] ragged.
        prompt_index: [N] the prompt of each row.
        response_ids: [N] ragged.
        policy_version: version of the weights that generated.
    """
    padded_prompts, prompt_mask = pad_left(prompt_ids)  # [B, P]
    padded_responses, response_mask = pad_right(response_ids)  # [N, R]
    experience = Experience(
        prompt_ids=padded_prompts,
        prompt_mask=prompt_mask,
        prompt_index=torch.tensor(prompt_index, dtype=torch.long),
        response_ids=padded_responses,
        response_mask=response_mask,
        loss_mask=response_mask,
        sampling_logprobs=torch.zeros(response_mask.shape),
        rewards=torch.zeros(len(response_ids)),
        advantages=torch.zeros(response_mask.shape),
        policy_version=policy_version,
    )
    experience.layout = Layout(
        list(prompt_index), [len(prompt) for prompt in prompt_ids], [len(response) for response in response_ids]
    )
    return experience


def padded_experience(
    rollouts: Rollouts, mask_truncated_completions: bool = False, weights: Mapping[str, float] | None = None
) -> Experience:
    """Pad rollouts, with the log-probs that are known of them; advantages are zero until they are estimated.

    Args:
        rollouts: N scored rows.
        mask_truncated_completions: leave rows that were cut at a limit, of tokens or turns, out of the loss.
        weights: of the reward functions, by name; with them go the scores of each.
    """
    owners = [rollouts.request.prompt_index(row) for row in range(rollouts.num_rows)]
    experience = padded_rows(rollouts.prompts.prompt_ids, owners, rollouts.response_ids, rollouts.policy_version)
    experience.sampling_logprobs, _ = pad_right(rollouts.sampling_logprobs, dtype=torch.float32)  # [N, R]
    experience.recorded_logprobs = _known_logprobs(rollouts, "policy_logprobs", experience.response_mask)
    experience.reference_logprobs = _known_logprobs(rollouts, "reference_logprobs", experience.response_mask)
    experience.rewards = _with_nan(rollouts.total_rewards)
    if weights is not None:
        experience.scores = torch.stack([_with_nan(rollouts.rewards[name]) for name in weights], -1)
        experience.score_weights = torch.tensor(list(weights.values()), dtype=torch.float32)
    experience.observation_mask = observation_mask_of(rollouts)
    experience.loss_mask = experience.policy_mask
    if mask_truncated_completions:
        experience.loss_mask = experience.loss_mask & ~torch.tensor(rollouts.truncated)[:, None]
    return experience


def _with_nan(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float32)


def observation_mask_of(rollouts: Rollouts) -> Tensor | None:
    """`Experience.observation_mask` of rollouts."""
    if not rollouts.episodes:
        return None
    return pad_right([episode.observation_mask for episode in rollouts.episodes], dtype=torch.bool)[0]


def _known_logprobs(rollouts: Rollouts, name: str, response_mask: Tensor) -> Tensor:
    """Log-probs of `KnownRow`, [N, R]; NaN where they are not known, 0 on padding."""
    logprobs = torch.full(response_mask.shape, torch.nan).masked_fill_(~response_mask, 0)
    for row, known in enumerate(rollouts.known):
        values = None if known is None else getattr(known, name)
        if values is not None:
            logprobs[row, : len(values)] = torch.as_tensor(values, dtype=torch.float32)
    return logprobs


def rows_with_gradient(experience: Experience, every_row_matters: bool) -> list[int]:
    """Rows whose gradient is not exactly zero.

    A row without advantage contributes nothing to the surrogate. One row is always kept, so that a step without any
    signal still goes through the optimizer with a zero gradient, as it would if every row were computed.

    Args:
        experience: N rows.
        every_row_matters: another term of the loss, such as a KL penalty, reaches rows without advantage.
    """
    matters = experience.loss_mask.any(-1)  # [N]
    if not every_row_matters:
        matters &= (experience.advantages * experience.loss_mask).any(-1)
    return [row for row, does in enumerate(matters.tolist()) if does] or [0]
