"""Log-probs of given tokens, from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MB in float32, and as much again for what is made of them


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token under `softmax(hidden @ weight.T / temperature)`, with the entropy beside it.

    Logits are computed for a chunk of tokens at a time, reduced in float32, thrown away, and computed again in the
    backward pass. Memory beyond inputs and gradients is one chunk, whatever the number of tokens. Under autocast the
    matrix products run in the autocast dtype.

    No library function stands behind it: `torch.nn.functional.linear_cross_entropy` (2.13) knows neither temperature
    nor entropies, and cuts into chunks in the same way. liger-kernel 0.8.5 gives both
    (`fused_linear_scaled_cross_entropy`), but from a kernel for bf16 on compute capability 9.0 alone, where the host
    waits for a check of the targets, and elsewhere from such a loop.

    Args:
        hidden: [T, H] last hidden states, after the final norm.
        weight: [V, H] rows of the output head.
        targets: [T] long, token ids.
        temperature: softmax temperature, positive.
        chunk_tokens: tokens per chunk; by default as many as make 128 MB of float32 logits.

    Returns:
        Log-probs [T] and entropies [T] in nats, differentiable in `hidden` and `weight`, float32. A backward pass
        that does not ask for the entropies costs no more for them.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to have log-probs, got {temperature}")
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)  # [T]
        entropy = torch.empty_like(logprobs)
        with torch.autocast(device, enabled=False):
            for rows, _, _, logits, spare in _logit_chunks(ctx, hidden, weight.to(ctx.dtype)):
                torch.log_softmax(logits, -1, out=spare)
                logprobs[rows] = spare.gather(-1, targets[rows, None]).squeeze(-1)
                entropy[rows] = torch.exp(spare, out=logits).mul_(spare).sum(-1).neg_()
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = hidden.new_zeros(len(targets), dtype=torch.float32)
        head = weight.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        addend = None if ctx.dtype == torch.float32 else torch.empty_like(head)  # [V, H]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, states, product, logits, spare in _logit_chunks(ctx, hidden, head):
                # d logprob / d logits = (one_hot(target) - softmax) / temperature
                scale = grad_logprobs[rows, None] / ctx.temperature  # [t, 1]
                if grad_entropy is None:
                    grad = torch.softmax(logits, -1, out=spare).mul_(-scale)  # [t, V]
                else:
                    grad = _with_entropy(logits, spare, scale, grad_entropy[rows, None] / ctx.temperature)
                grad.scatter_add_(-1, targets[rows, None], scale)
                grad = grad if ctx.dtype == torch.float32 else product.copy_(grad)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_weight is not None and addend is not None:  # the sum over chunks is in float32
                    grad_weight += torch.mm(grad.T, states, out=addend)
                elif grad_weight is not None:
                    grad_weight.addmm_(grad.T, states)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _with_entropy(logits: Tensor, spare: Tensor, scale: Tensor, entropy_scale: Tensor) -> Tensor:
    """Gradient [t, V] of scaled log-probs, without that of the target itself, and of scaled entropies.

    d entropy / d logits = -softmax * (log_softmax + entropy) / temperature; writes over both buffers.
    """
    logprobs = torch.log_softmax(logits, -1, out=spare)
    probs = torch.exp(logprobs, out=logits)
    entropy = -(probs * logprobs).sum(-1, keepdim=True)  # [t, 1]
    return logprobs.add_(entropy).mul_(entropy_scale).add_(scale).mul_(probs).neg_()


class _LogitChunk(NamedTuple):
    rows: slice
    states: Tensor
    """[t, H] hidden states of the rows, in the dtype of the product."""
    product: Tensor
    """[t, V] in that dtype, to be written over; in float32 it is `logits`."""
    logits: Tensor
    """[t, V] float32, logits over temperature."""
    spare: Tensor
    """[t, V] float32, to be written over."""


def _logit_chunks(ctx: Any, hidden: Tensor, head: Tensor) -> Iterator[_LogitChunk]:
    """Logits of the rows, chunk by chunk, in memory that the next chunk uses again.

    Fresh memory for every chunk would cost more time on a CPU than the arithmetic.
    """
    size = min(ctx.chunk, len(hidden))
    buffers = hidden.new_empty(2, size, head.shape[0], dtype=torch.float32)
    products = buffers[0] if ctx.dtype == torch.float32 else torch.empty_like(buffers[0], dtype=ctx.dtype)
    for start in range(0, len(hidden), ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        states = hidden[rows].to(ctx.dtype)  # [t, H]
        logits, spare = buffers[:, : len(states)]
        product = torch.mm(states, head.T, out=products[: len(states)])  # [t, V]
        if ctx.dtype != torch.float32:
            logits.copy_(product)
        if ctx.temperature != 1:
            logits.div_(ctx.temperature)
        yield _LogitChunk(rows, states, product, logits, spare)
