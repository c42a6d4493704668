"""Logits from which sampling departs from the softmax of the policy, as both engines on a CPU take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def min_p_logits(logits: Tensor, min_p: Tensor | float) -> Tensor:
    """Without the tokens that are less likely than a share of the most likely one (Nguyen et al. 2024, arXiv
    2407.01082).

    Args:
        logits: [n, V], temperature applied.
        min_p: that share, in [0, 1]; [n, 1] for one per row.

    Example:
        >>> min_p_logits(torch.tensor([[0.6, 0.35, 0.05]]).log(), 0.5).softmax(-1)
        tensor([[0.6316, 0.3684, 0.0000]])
    """
    least = logits.amax(-1, keepdim=True) + torch.as_tensor(min_p, device=logits.device, dtype=logits.dtype).log()
    return logits.masked_fill(logits < least, -math.inf)


def penalised_logits(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Under a repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1, with negative logits multiplied as
    in transformers and vLLM).

    Args:
        logits: [n, V], before the temperature.
        seen: [n, V] bool, True for tokens of prompt and response.
        penalty: positive, 1 for none; [n, 1] for one per row.

    Example:
        >>> penalised_logits(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), 2.0)
        tensor([[ 1., -4.,  2.]])
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
