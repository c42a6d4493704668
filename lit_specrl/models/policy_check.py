"""Whether the policy's log-probs are those of the model's own logits, tried on a short input when the policy is
built."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_specrl.masking import pad_left, pad_right

# Rows of unequal length, so that padding stands on both sides, and one prompt with two responses.
_PROMPTS, _PROMPT_INDEX, _RESPONSES = [[5, 6], [7]], [0, 1, 0], [[4, 7], [6], [5]]
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats
_TOLERANCE_OF_HALF = 0.5  # nats; padding changes the rounding of 8 bits by up to 0.4


@torch.no_grad()
def check_logprobs(model: PreTrainedModel, policy: Any) -> None:
    """Compare the log-probs of a short input with the model's own logits.

    They differ where the model does more with its hidden states than multiply them with the head: a bias, a multiplier,
    a cap. What its configuration or its head says is refused however little it shows in a short input: a cap does
    nothing to small logits.

    Args:
        model: a causal language model.
        policy: a `Policy` of it, or what is called like one.

    Raises:
        ValueError: they differ or will, or the model cannot compute them.
    """
    name = type(model).__name__
    advice = "use a model of the Llama, Qwen, Mistral or SmolLM kind"
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no output head, which log-probs of tokens need; {advice}")
    try:
        own, ours = _own_logprobs(model), _logprobs(model, policy)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot compute log-probs of responses: {error}; {advice}") from error
    difference, reasons = (own - ours).abs().max(), _reasons(model)
    if reasons or not difference <= _tolerance(model):
        raise ValueError(
            f"{name} does more with its hidden states than multiply them with the head "
            f"({reasons or 'its configuration does not say what'}): its log-probs of a short input are "
            f"{difference:.2g} nats from those that would be trained; {advice}"
        )


def _logprobs(model: PreTrainedModel, policy: Any) -> Tensor:
    device = model.device
    prompts, responses = ([[_token(model, token) for token in row] for row in rows] for rows in (_PROMPTS, _RESPONSES))
    inputs = *pad_left(prompts), torch.tensor(_PROMPT_INDEX), *pad_right(responses)
    out = policy(*(tensor.to(device) for tensor in inputs))
    return torch.cat([row[: len(response)] for row, response in zip(out.logprobs, _RESPONSES, strict=True)])


def _own_logprobs(model: PreTrainedModel) -> Tensor:
    """By the model's logits, of each row alone and without padding."""
    found = []
    for prompt, response in zip([_PROMPTS[index] for index in _PROMPT_INDEX], _RESPONSES, strict=True):
        ids = torch.tensor([[_token(model, token) for token in prompt + response]], device=model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()  # [r, V]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(found)


def _token(model: PreTrainedModel, token: int) -> int:
    return token % model.config.get_text_config().vocab_size


def _tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE.get(cast(torch.dtype, model.dtype), _TOLERANCE_OF_HALF)


def _reasons(model: PreTrainedModel) -> str:
    """What its configuration and its head say of it."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    names = ("final_logit_softcapping", "logits_scaling", "logit_scale", "logits_soft_cap", "lm_head_multiplier")
    found = [name for name in names if getattr(config, name, None) not in (None, 0, 1, 1.0)]
    bias = getattr(head, "bias", None)
    found += ["a head with bias"] if bias is not None and bool(bias.any()) else []
    return ", ".join(found)
