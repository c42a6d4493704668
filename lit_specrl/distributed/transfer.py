"""Tensors that travel between host and device together, in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on a device, without gradient.

    Between host and GPU their bytes are joined and copied once: every copy of its own would let the host wait. To the
    GPU the host does not wait at all. Where nothing has to move, the tensors come back as they are.

    Args:
        tensors: of any shapes and dtypes, all on one side.
        device: where they go.

    Example:
        >>> [number, row] = moved_together([torch.tensor(2), torch.tensor([0.5, 1.5])], "cpu")
        >>> int(number), row.tolist()
        (2, [0.5, 1.5])
    """
    device = torch.device(device)
    moving = [number for number, tensor in enumerate(tensors) if tensor.device.type != device.type]
    if not any("cuda" in (device.type, tensors[number].device.type) for number in moving):
        return [tensor.detach().to(device) for tensor in tensors]
    parts = [tensors[number].detach() for number in moving]
    joined = joined_bytes(parts)
    if device.type == "cuda":
        joined = joined.pin_memory()
    moved = split_bytes(joined.to(device, non_blocking=device.type == "cuda"), parts)
    arrived = dict(zip(moving, moved, strict=True))
    return [arrived[number] if number in arrived else tensor.to(device) for number, tensor in enumerate(tensors)]


def joined_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, the widest numbers first, [num_bytes] uint8."""
    return torch.cat([tensors[number].contiguous().view(-1).view(torch.uint8) for number in _widest_first(tensors)])


def split_bytes(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `joined_bytes` has joined, as views of the bytes.

    Args:
        joined: [num_bytes] uint8.
        like: tensors of the same shapes and dtypes, in the same order.
    """
    order = _widest_first(like)
    sizes = [like[number].numel() * like[number].element_size() for number in order]
    found = {
        number: part.view(like[number].dtype).view(like[number].shape)
        for number, part in zip(order, joined.split(sizes), strict=True)
    }
    return [found[number] for number in range(len(like))]


def _widest_first(tensors: Sequence[Tensor]) -> list[int]:
    """An order in which every tensor begins at a multiple of the width of its numbers."""
    return sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size())
