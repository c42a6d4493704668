"""Hidden states from which response tokens are predicted, each prompt computed per row or once for all of its rows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def response_states(
    backbone: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    prompt_index: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    share_prompts: bool = False,
) -> Tensor:
    """Last hidden states at the position before each response token.

    Args:
        backbone: a transformers model without a head.
        prompt_ids: [B, P] long, left-padded.
        prompt_mask: [B, P] bool, True on prompt tokens.
        prompt_index: [N] long, the prompt of each row.
        response_ids: [N, R] long, right-padded.
        response_mask: [N, R] bool, True on response tokens.
        share_prompts: compute each prompt once, keep its keys and values in the graph and let its responses attend to
            them, instead of once per response. Values and gradients are those of the plain pass.

    Returns:
        [N, R, H]; what stands on padding means nothing.
    """
    states = _shared_states if share_prompts else _plain_states
    return states(backbone, prompt_ids, prompt_mask, prompt_index, response_ids, response_mask)


def _plain_states(
    backbone: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    prompt_index: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
) -> Tensor:
    ids = torch.cat([prompt_ids[prompt_index], response_ids], dim=1)  # [N, P + R]
    mask = torch.cat([prompt_mask[prompt_index], response_mask], dim=1)
    hidden = backbone(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1].long(),
        position_ids=_positions(mask)[:, :-1],
        use_cache=False,
    ).last_hidden_state
    return hidden[:, prompt_ids.shape[1] - 1 :]


def _shared_states(
    backbone: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    prompt_index: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
) -> Tensor:
    prompt_pass = backbone(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=_positions(prompt_mask),
        use_cache=True,
    )
    first = prompt_pass.last_hidden_state[prompt_index, -1:]  # [N, 1, H]
    if response_ids.shape[1] == 1:
        return first
    cache = prompt_pass.past_key_values
    cache.batch_select_indices(prompt_index)
    mask = torch.cat([prompt_mask[prompt_index], response_mask], dim=1)[:, :-1]  # [N, P + R - 1]
    rest = backbone(
        input_ids=response_ids[:, :-1],
        attention_mask=mask.long(),
        position_ids=_positions(mask)[:, prompt_ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], dim=1)


def _positions(mask: Tensor) -> Tensor:
    """Position of each token among the real tokens of its row, [N, L]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
