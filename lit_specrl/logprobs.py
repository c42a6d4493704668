"""Log-probs of given tokens, from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MB in float32


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token under `softmax(hidden @ weight.T / temperature)`, with the entropy beside it.

    Logits are computed for a chunk of tokens at a time, reduced in float32, thrown away, and computed again in the
    backward pass. Memory beyond inputs and gradients is one chunk, whatever the number of tokens. Under autocast the matrix products run in
    the autocast dtype.

    Args:
        hidden: [T, H] last hidden states, after the final norm.
        weight: [V, H] rows of the output head.
        targets: [T] long, token ids.
        temperature: softmax temperature, positive.
        chunk_tokens: tokens per chunk; by default as many as make 256 MB of float32 logits.

    Returns:
        Log-probs [T] in nats (differentiable in `hidden` and `weight`) and entropies [T] in nats (without gradient), float32.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to have log-probs, got {temperature}")
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()  # [t, V]
    return logits if temperature == 1 else logits.div_(temperature)


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        head = weight.to(dtype)
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)  # [T]
        entropy = torch.empty_like(logprobs)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(targets), chunk):
                logits = _logits(hidden[rows].to(dtype), head, temperature)  # [t, V]
                log_normaliser = logits.logsumexp(-1)  # [t]
                logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_normaliser
                probs = (logits - log_normaliser[:, None]).exp_()
                # 0 * -inf would be nan; a masked-out logit contributes nothing to the entropy
                entropy[rows] = log_normaliser - (probs * logits.clamp_min_(torch.finfo(torch.float32).min)).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(targets), ctx.chunk):
                states = hidden[rows].to(ctx.dtype)  # [t, H]
                # d logprob / d logits = (one_hot(target) - softmax) / temperature
                scale = grad_logprobs[rows, None] / ctx.temperature  # [t, 1]
                grad = _logits(states, head, ctx.temperature).softmax(-1).mul_(-scale)  # [t, V]
                grad.scatter_add_(-1, targets[rows, None], scale)
                grad = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad @ head).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
