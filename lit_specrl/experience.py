"""From ragged rollouts to the rectangles that the loss works on."""

from __future__ import annotations

import torch

from lit_specrl.masking import pad_left, pad_right
from lit_specrl.types import Experience, Rollouts


def padded_experience(rollouts: Rollouts, mask_truncated_completions: bool = False) -> Experience:
    """Pad rollouts; advantages are zero until they are estimated.

    Args:
        rollouts: N scored rows.
        mask_truncated_completions: leave rows that were cut at the length limit out of the loss.
    """
    prompt_ids, prompt_mask = pad_left(rollouts.prompts.prompt_ids)  # [B, P]
    response_ids, response_mask = pad_right(rollouts.response_ids)  # [N, R]
    sampling_logprobs, _ = pad_right(rollouts.sampling_logprobs, dtype=torch.float32)  # [N, R]
    loss_mask = response_mask
    if mask_truncated_completions:
        loss_mask = response_mask & ~torch.tensor(rollouts.truncated)[:, None]
    return Experience(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.tensor([rollouts.request.prompt_index(row) for row in range(rollouts.num_rows)]),
        response_ids=response_ids,
        response_mask=response_mask,
        loss_mask=loss_mask,
        sampling_logprobs=sampling_logprobs,
        rewards=torch.tensor(
            [torch.nan if reward is None else reward for reward in rollouts.total_rewards], dtype=torch.float32
        ),
        advantages=torch.zeros(response_mask.shape),
        policy_version=rollouts.policy_version,
    )


def active_rows(experience: Experience, every_row_matters: bool) -> list[int]:
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
