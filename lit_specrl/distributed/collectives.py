"""What the ranks of a run tell each other; with one rank every function returns what it was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; its shape must be the same on each."""
    return _reduced(value, dist.ReduceOp.SUM)


def max_over_ranks(value: int, device: torch.device) -> int:
    """Largest value of all ranks."""
    return value if num_ranks() == 1 else int(_reduced(torch.tensor(value, device=device), dist.ReduceOp.MAX))


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in order of rank. They travel pickled: small things, or tensors on the CPU."""
    if num_ranks() == 1:
        return [value]
    gathered: list[T] = [value] * num_ranks()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(values: Tensor) -> tuple[Tensor, slice]:
    """Rows of all ranks, one after the other, and where the rows of this rank stand among them.

    Args:
        values: [n, ...] the rows of this rank; n may differ between ranks.
    """
    if num_ranks() == 1:
        return values, slice(0, len(values))
    parts = gather_objects(values.cpu())
    start = sum(len(part) for part in parts[: dist.get_rank()])
    return torch.cat(parts).to(values.device), slice(start, start + len(values))


def whole_tensor(parameter: Tensor) -> Tensor:
    """A parameter without its gradient, gathered where it is sharded; every rank must ask."""
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(compute_device(tensor))
    return on_device.full_tensor()


def compute_device(parameter: Tensor) -> torch.device:
    """Where a parameter is when it is computed with; shards may wait on the host."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == "cpu":
        return parameter.device
    return torch.device(parameter.device_mesh.device_type, torch.cuda.current_device())


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks."""
    count = num_ranks()
    if count == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= count


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if num_ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value
