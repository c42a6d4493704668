"""From hidden states to values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One linear unit on the hidden state before each response token.

    Begins at zero, so that the first advantages are the returns themselves. Computes in float32 whatever autocast says:
    bf16 values have three digits, which is less than the advantages that are told apart by them.

    Args:
        hidden_size: H.
        detach: keep the gradient from the hidden states; the head then learns alone.
    """

    def __init__(self, hidden_size: int, detach: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach = detach

    def forward(self, hidden: Tensor, response_mask: Tensor) -> Tensor:
        """Values before each response token.

        Args:
            hidden: [N, R, H].
            response_mask: [N, R] bool, True on response tokens.

        Returns:
            [N, R] float32, 0 on padding.
        """
        hidden = hidden.detach() if self.detach else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            values = nn.functional.linear(hidden.float(), self.linear.weight.float(), self.linear.bias.float())
        return values.squeeze(-1).masked_fill(~response_mask, 0)
