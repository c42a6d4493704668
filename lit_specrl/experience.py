"""From ragged rollouts to the rectangles that the loss works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

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


@dataclass
class Experience:
    """Rollouts with everything the loss needs, padded.

    Prompts are left-padded and responses right-padded: a response starts at the same column in every row.
    """

    TOKEN_FIELDS: ClassVar[tuple[str, ...]] = (
        "response_ids",
        "response_mask",
        "loss_mask",
        "sampling_logprobs",
        "advantages",
        "old_logprobs",
        "reference_logprobs",
        "recorded_logprobs",
        "kl_penalty",
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
    """[N, R] bool, True on response tokens (end-of-text included)."""
    loss_mask: Tensor
    """[N, R] bool, True on tokens that take part in the loss; a subset of `response_mask`."""
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
    values: Tensor | None = None
    """[N, R] float32, the critic's estimate before each token; `None` without a critic."""
    returns: Tensor | None = None
    """[N, R] float32, the critic's target; `None` without a critic."""

    @property
    def num_rows(self) -> int:
        return self.response_ids.shape[0]

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

    def select(self, rows: list[int]) -> Experience:
        """The given rows with their prompts, padded no further than these rows need."""
        prompts, prompt_index = self.prompt_index[rows].unique(return_inverse=True)
        prompt_mask = self.prompt_mask[prompts]
        first_column = prompt_mask.shape[1] - int(prompt_mask.sum(-1).max())
        num_columns = int(self.response_mask[rows].sum(-1).max())
        cut: dict[str, Any] = {
            name: value[rows, :num_columns] for name in self.TOKEN_FIELDS if (value := getattr(self, name)) is not None
        }
        return replace(
            self,
            **cut,
            prompt_ids=self.prompt_ids[prompts, first_column:],
            prompt_mask=prompt_mask[:, first_column:],
            prompt_index=prompt_index,
            rewards=self.rewards[rows],
        )

    def record_logprobs(self, logprobs: Tensor, rows: list[int]) -> None:
        """Enter log-probs under the policy that this step began with.

        Args:
            logprobs: [n, r] nats, r at most R.
            rows: the n rows that they are of.
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
        part = self.prompt_index // (num_prompts // count)  # [N]
        return [self.select((part == index).nonzero().squeeze(-1).tolist()) for index in range(count)] * passes

    def to(self, device: torch.device | str) -> Experience:
        """Copy with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
    return Experience(
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


def padded_experience(rollouts: Rollouts, mask_truncated_completions: bool = False) -> Experience:
    """Pad rollouts, with the log-probs that are known of them; advantages are zero until they are estimated.

    Args:
        rollouts: N scored rows.
        mask_truncated_completions: leave rows that were cut at the length limit out of the loss.
    """
    owners = [rollouts.request.prompt_index(row) for row in range(rollouts.num_rows)]
    experience = padded_rows(rollouts.prompts.prompt_ids, owners, rollouts.response_ids, rollouts.policy_version)
    experience.sampling_logprobs, _ = pad_right(rollouts.sampling_logprobs, dtype=torch.float32)  # [N, R]
    experience.recorded_logprobs = _known_logprobs(rollouts, "policy_logprobs", experience.response_mask)
    experience.reference_logprobs = _known_logprobs(rollouts, "reference_logprobs", experience.response_mask)
    experience.rewards = torch.tensor(
        [torch.nan if reward is None else reward for reward in rollouts.total_rewards], dtype=torch.float32
    )
    if mask_truncated_completions:
        experience.loss_mask = experience.response_mask & ~torch.tensor(rollouts.truncated)[:, None]
    return experience


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
    return matters.nonzero().squeeze(-1).tolist() or [0]
