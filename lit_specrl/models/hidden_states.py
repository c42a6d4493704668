"""Hidden states of prompts and responses, each prompt computed per row or once for all of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_specrl.experience import Layout, TokenBatch
from lit_specrl.masking import pad_left, pad_right
from lit_specrl.models.attention_masks import known_padding


class HiddenStates(NamedTuple):
    """Hidden states of a forward pass; those on padding have no meaning."""

    last: Tensor
    """[N, R, H] last hidden states at the position before each response token."""
    prompt_features: Tensor | None = None
    """[B, P, F], or [N, P, F] where each row computed its own prompt: inputs of the given layers, joined."""
    response_features: Tensor | None = None
    """[N, R - 1, F] the same at all response tokens but the last."""
    shares_prompts: bool = False


def forward_hidden_states(
    backbone: PreTrainedModel,
    batch: TokenBatch,
    share_prompts: bool = False,
    layers: Sequence[int] = (),
    layout: Layout | None = None,
) -> HiddenStates:
    """Run the backbone over prompts and responses.

    Args:
        backbone: a transformers model without a head.
        batch: N rows.
        share_prompts: compute each prompt once, keep its keys and values in the graph and let its responses attend to
            them, instead of once per response. Values and gradients are those of the plain pass.
        layers: decoder layers whose inputs are returned, too.
        layout: of the batch; `None` reads it from the tensors, for which the host waits.
    """
    states = _shared_states if share_prompts else _plain_states
    return states(backbone, batch, layers, layout or Layout.of(batch))


@torch.no_grad()
def keeps_cache_by_row(backbone: PreTrainedModel) -> bool:
    """Whether the cache of a prompt can be repeated for its responses, tried on a short input.

    It cannot in transformers 5.19 where layers keep a state instead of keys and values (linear attention, convolutions,
    Mamba).

    Args:
        backbone: a transformers model without a head.
    """
    inputs = *pad_left([[5, 6], [4]]), torch.tensor([0, 1, 0]), *pad_right([[4, 6], [5, 6], [6, 5]])
    batch = TokenBatch(*(tensor.to(next(backbone.parameters()).device) for tensor in inputs))
    was_training = backbone.training
    backbone.eval()  # gradient checkpointing switches the cache off in training
    try:
        plain, shared = (
            forward_hidden_states(backbone, batch, share_prompts).last.float() for share_prompts in (False, True)
        )
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        backbone.train(was_training)
    tolerance = 1e-3 if backbone.dtype in (torch.float32, torch.float64) else 0.2  # of the largest entry
    return bool((plain - shared).abs().max() <= tolerance * plain.abs().max())


def _plain_states(
    backbone: PreTrainedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    layout: Layout,
) -> HiddenStates:
    prompt_ids, prompt_mask, prompt_index, response_ids, response_mask = batch
    ids = torch.cat([prompt_ids[prompt_index], response_ids], dim=1)  # [N, P + R]
    mask = torch.cat([prompt_mask[prompt_index], response_mask], dim=1)
    with known_padding(_has_padded_prompts(batch, layout) or _has_padded_inputs(batch, layout)):
        output = backbone(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1].long(),
            position_ids=_positions(mask)[:, :-1],
            use_cache=False,
            output_hidden_states=bool(layers),
        )
    num_columns = prompt_ids.shape[1]
    last = output.last_hidden_state[:, num_columns - 1 :]
    if not layers:
        return HiddenStates(last)
    features = _features(output, layers)
    return HiddenStates(last, features[:, :num_columns], features[:, num_columns:])


def _shared_states(
    backbone: PreTrainedModel,
    batch: TokenBatch,
    layers: Sequence[int],
    layout: Layout,
) -> HiddenStates:
    prompt_ids, prompt_mask, prompt_index, response_ids, response_mask = batch
    with known_padding(_has_padded_prompts(batch, layout)):
        prompt_pass = backbone(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            position_ids=_positions(prompt_mask),
            use_cache=True,
            output_hidden_states=bool(layers),
        )
    prompt_features = _features(prompt_pass, layers) if layers else None
    first = prompt_pass.last_hidden_state[prompt_index, -1:]  # [N, 1, H]
    if response_ids.shape[1] == 1:
        nothing = (
            None if prompt_features is None else prompt_features.new_empty(len(first), 0, prompt_features.shape[-1])
        )
        return HiddenStates(first, prompt_features, nothing, shares_prompts=True)
    cache = prompt_pass.past_key_values
    cache.batch_select_indices(prompt_index)
    mask = torch.cat([prompt_mask[prompt_index], response_mask], dim=1)[:, :-1]  # [N, P + R - 1]
    with known_padding(_has_padded_prompts(batch, layout) or _has_padded_inputs(batch, layout)):
        rest = backbone(
            input_ids=response_ids[:, :-1],
            attention_mask=mask.long(),
            position_ids=_positions(mask)[:, prompt_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(layers),
        )
    last = torch.cat([first, rest.last_hidden_state], dim=1)
    response_features = _features(rest, layers) if layers else None
    return HiddenStates(last, prompt_features, response_features, shares_prompts=True)


def _features(output: Any, layers: Sequence[int]) -> Tensor:
    return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1).detach()


def _has_padded_prompts(batch: TokenBatch, layout: Layout) -> bool:
    return min(layout.prompt_lengths) < batch.prompt_ids.shape[1]


def _has_padded_inputs(batch: TokenBatch, layout: Layout) -> bool:
    """Whether there is padding among the response tokens that are read: nobody reads the last column."""
    return min(layout.response_lengths) < batch.response_ids.shape[1] - 1


def _positions(mask: Tensor) -> Tensor:
    """Position of each token among the real tokens of its row, [N, L]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)
