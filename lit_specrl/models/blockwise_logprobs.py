"""Log-probs of responses in blocks; scoring of a row stops when the caller rejects it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_specrl.experience import TokenBatch
from lit_specrl.models.logprobs import token_logprobs
from lit_specrl.models.policy import Policy

KeepScoring = Callable[[Tensor, int, Tensor], Tensor]
"""(rows [m], first column, log-probs [m, b]) -> [m] bool, True where scoring of the row goes on."""


@torch.no_grad()
def block_logprobs(
    policy: Policy,
    batch: TokenBatch,
    keep_scoring: KeepScoring,
    block_length: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs of response tokens; scoring of a row stops behind the first block after which it is rejected.

    Each prompt is computed once, whatever the number of its rows; keys and values stay from block to block.

    Args:
        policy: whose log-probs.
        batch: N rows.
        keep_scoring: says after every block which rows go on.
        block_length: tokens of a block.
        temperature: softmax temperature.

    Returns:
        [N, R] float32, nats; NaN where scoring stopped early, 0 on padding.
    """
    prompt_ids, prompt_mask, prompt_index, response_ids, response_mask = batch
    with policy.evaluating():
        backbone: Any = policy.model.base_model
        head = policy.model.get_output_embeddings().weight
        result = torch.full(response_ids.shape, torch.nan, device=response_ids.device).masked_fill(~response_mask, 0)
        prompt_pass = backbone(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            position_ids=(prompt_mask.long().cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
        )
        cache = prompt_pass.past_key_values
        cache.batch_select_indices(prompt_index)
        last = prompt_pass.last_hidden_state[prompt_index, -1:]  # [N, 1, H], predicts the first column of a block
        rows = torch.arange(len(response_ids), device=response_ids.device)  # rows that go on, [m]
        for start in range(0, response_ids.shape[1], block_length):
            stop = min(start + block_length, response_ids.shape[1])
            known = torch.cat([prompt_mask[prompt_index[rows]], response_mask[rows, :stop]], dim=1)  # [m, P + stop]
            hidden = backbone(
                input_ids=response_ids[rows, start:stop],
                attention_mask=known.long(),
                position_ids=(known.long().cumsum(-1) - 1).clamp_min(0)[:, -(stop - start) :],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # [m, b, H]
            states = torch.cat([last, hidden[:, :-1]], dim=1)  # [m, b, H]
            mask = response_mask[rows, start:stop]  # [m, b]
            logprobs, _ = token_logprobs(states[mask], head, response_ids[rows, start:stop][mask], temperature)
            block = torch.zeros(mask.shape, device=logprobs.device).masked_scatter(mask, logprobs)  # [m, b]
            result[rows, start:stop] = block
            goes_on = keep_scoring(rows, start, block) & (response_mask[rows].sum(-1) > stop)
            if not goes_on.any():
                break
            keep = goes_on.nonzero().squeeze(-1)
            last = hidden[keep, -1:]
            if len(keep) < len(rows):
                cache.batch_select_indices(keep)
                rows = rows[keep]
        return result
