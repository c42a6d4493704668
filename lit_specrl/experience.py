"""From ragged rollouts to the rectangles that the loss works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_specrl.masking import pad_left, pad_right
from lit_specrl.types import Experience, Rollouts


def padded_rows(
    prompt_ids: Sequence[Sequence[int]],
    prompt_index: Sequence[int],
    response_ids: Sequence[Sequence[int]],
    policy_version: int = 0,
) -> Experience:
    """Pad prompts and responses; everything that is not known of them yet is zero.

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
    """Pad rollouts; advantages are zero until they are estimated.

    Args:
        rollouts: N scored rows.
        mask_truncated_completions: leave rows that were cut at the length limit out of the loss.
    """
    owners = [rollouts.request.prompt_index(row) for row in range(rollouts.num_rows)]
    experience = padded_rows(rollouts.prompts.prompt_ids, owners, rollouts.response_ids, rollouts.policy_version)
    experience.sampling_logprobs, _ = pad_right(rollouts.sampling_logprobs, dtype=torch.float32)  # [N, R]
    experience.rewards = torch.tensor(
        [torch.nan if reward is None else reward for reward in rollouts.total_rewards], dtype=torch.float32
    )
    if mask_truncated_completions:
        experience.loss_mask = experience.response_mask & ~torch.tensor(rollouts.truncated)[:, None]
    return experience


def rows_with_gradient(experience: Experience, every_row_matters: bool) -> list[int]:
    """Rows whose gradient is not exactly zero.

    A row without advantage contributes nothing to the surrogate. One row is always kept, so that a step without any signal still
    goes through the optimizer with a zero gradient, as it would if every row were computed.

    Args:
        experience: N rows.
        every_row_matters: another term of the loss, such as a KL penalty, reaches rows without advantage.
    """
    matters = experience.loss_mask.any(-1)  # [N]
    if not every_row_matters:
        matters &= (experience.advantages * experience.loss_mask).any(-1)
    return matters.nonzero().squeeze(-1).tolist() or [0]
