"""How much each token's loss weighs in the loss of the whole batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "sequence_sum", "fixed"]


def token_weights(
    loss_mask: Tensor,
    aggregation: Aggregation,
    *,
    num_tokens: int | Tensor | None = None,
    num_sequences: int | Tensor | None = None,
    max_completion_length: int | None = None,
    num_ranks: int = 1,
) -> Tensor:
    """Weights such that `(per_token_loss * weights).sum()` is the loss.

    | aggregation | weight of a loss token in row n | verl's `loss_agg_mode` | from |
    |---|---|---|---|
    | "token" | 1 / num_tokens | token-mean | DAPO (arXiv 2503.14476, equation 8) |
    | "sequence" | 1 / (tokens of row n * num_sequences) | seq-mean-token-mean | GRPO (arXiv 2402.03300, equation 3) |
    | "sequence_sum" | 1 / num_sequences | seq-mean-token-sum | LUSPO (arXiv 2602.05261) |
    | "fixed" | 1 / (max_completion_length * num_sequences) | seq-mean-token-sum-norm | Dr. GRPO (arXiv 2503.20783) |

    The denominators belong to one optimizer step: count them over all its micro-batches and ranks. Then the
    micro-batch losses add up to the same number and the same gradient for any split of the rows. Without them
    `loss_mask` must be the whole batch. Every row counts as a sequence, also one without loss tokens (TRL; verl
    leaves those out when it counts itself: pass `num_sequences=loss_mask.any(-1).sum()` for that).

    Args:
        loss_mask: [N, R] bool, True on tokens that take part in the loss.
        aggregation: a row of the table.
        num_tokens: loss tokens of the step on all ranks; `None` counts those of `loss_mask`.
        num_sequences: rows of the step on all ranks; `None` means N.
        max_completion_length: longest response allowed, in tokens; needed by "fixed".
        num_ranks: ranks whose gradients are averaged afterwards (DDP and FSDP divide by it, so it is multiplied here).

    Returns:
        Weights [N, R] float32, 0 outside the mask.

    Raises:
        ValueError: unknown `aggregation`, or "fixed" without `max_completion_length`.

    Example:
        >>> token_weights(torch.tensor([[True, False], [True, True]]), "sequence")
        tensor([[0.5000, 0.0000],
                [0.2500, 0.2500]])
    """
    weights = loss_mask.float() * num_ranks  # [N, R]
    num_tokens = loss_mask.sum() if num_tokens is None else num_tokens
    num_sequences = len(loss_mask) if num_sequences is None else num_sequences
    if aggregation == "token":
        return weights / _at_least_one(num_tokens)
    if aggregation == "sequence":
        return weights / loss_mask.sum(-1, keepdim=True).clamp(min=1) / _at_least_one(num_sequences)
    if aggregation == "sequence_sum":
        return weights / _at_least_one(num_sequences)
    if aggregation == "fixed":
        if max_completion_length is None:
            raise ValueError("aggregation='fixed' divides by max_completion_length; pass it")
        return weights / max_completion_length / _at_least_one(num_sequences)
    raise ValueError(f"aggregation must be 'token', 'sequence', 'sequence_sum' or 'fixed', got {aggregation!r}")


def _at_least_one(count: int | Tensor) -> int | Tensor:
    """A batch without any loss token has loss 0, not 0 / 0."""
    return torch.clamp(count, min=1) if isinstance(count, Tensor) else max(count, 1)
