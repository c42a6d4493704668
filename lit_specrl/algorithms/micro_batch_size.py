"""How many tokens a micro-batch may have: as many as the memory that is free allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_specrl.distributed.collectives import max_over_ranks
from lit_specrl.experience import padded_rows
from lit_specrl.models.memory import moments
from lit_specrl.models.micro_batches import MicroBatch
from lit_specrl.models.scorer import Scorer

DEFAULT_MICRO_BATCH_TOKENS = 8192
"""On a CPU, and on a GPU until something is measured."""
_FEWEST, _MOST = 2**10, 2**16  # tokens
_PROBE_TOKENS = 2**11
_SHARE = 0.7  # of the free memory; the rest is for what torch cannot use of it, and for what is measured too low


class PassMemory(NamedTuple):
    """What a forward and backward pass takes on a device, in bytes."""

    per_token: float
    fixed: float
    """However many tokens there are."""


class MemoryMeter(Protocol):
    """Tells about the memory of a device."""

    def peak(self, run: Callable[[], None]) -> int:
        """Bytes at the peak of what `run` does, beyond those in use before."""

    def free(self) -> int:
        """Bytes that can still be had."""


class GPUMemory:
    """A `MemoryMeter` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> int:
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept


def choose_micro_batch_tokens(
    scorer: Scorer,
    backward: Callable[[Tensor], None],
    optimizers: Sequence[Any],
    max_length: int | None,
    meter: MemoryMeter | None = None,
) -> int:
    """Tokens of a micro-batch, the same on all ranks.

    On a GPU three short passes are run and their peaks of memory compared. 70 % of what is free behind the first
    rollout, while the engine is as it is in training, less what optimizers and reference have not taken yet, is divided
    by what a token takes. The result is a multiple of 1024, at most 65,536. On a CPU it is 8192.

    Args:
        scorer: runs the passes.
        backward: of the updates.
        optimizers: of policy and critic; `None` where there is none.
        max_length: longest prompt plus response of the run, in tokens, if there is one; rows of up to 2048 are tried.
        meter: of the device; `None` takes torch's where that is a GPU.
    """
    device = scorer.policy.device
    if meter is None and device.type != "cuda":
        return DEFAULT_MICRO_BATCH_TOKENS
    meter = meter or GPUMemory(device)
    try:
        length = min(max_length or _PROBE_TOKENS, _PROBE_TOKENS)
        memory = measured_pass(lambda num_rows: _probe(scorer, backward, num_rows, length), meter, length)
        free = meter.free() - _bytes_to_come(scorer, optimizers)
    finally:
        for parameter in scorer.policy.parameters():
            parameter.grad = None
    return -max_over_ranks(-affordable_tokens(free, memory), device)


def measured_pass(run: Callable[[int], None], meter: MemoryMeter, length: int) -> PassMemory:
    """What a pass takes, from the peaks of one over about 2048 tokens and of one over twice as many.

    Args:
        run: a forward and backward pass over so many rows.
        meter: of the device.
        length: of a row, in tokens.
    """
    num_rows = max(1, _PROBE_TOKENS // length)
    run(num_rows)  # gradients are there from here on
    small, large = meter.peak(partial(run, num_rows)), meter.peak(partial(run, 2 * num_rows))
    per_token = max(1.0, (large - small) / (num_rows * length))
    return PassMemory(per_token, max(0.0, small - per_token * num_rows * length))


def affordable_tokens(free_bytes: int, memory: PassMemory) -> int:
    """Tokens of a pass that fits.

    Args:
        free_bytes: that can be had.
        memory: of a pass.

    Example: 40 GiB, of which 70 % are taken, at a MiB a token:

        >>> affordable_tokens(40 * 2**30, PassMemory(per_token=2**20, fixed=2**30))
        27648
    """
    tokens = (_SHARE * free_bytes - memory.fixed) / memory.per_token
    return max(_FEWEST, min(_MOST, int(tokens) // _FEWEST * _FEWEST))


def _probe(scorer: Scorer, backward: Callable[[Tensor], None], num_rows: int, length: int) -> None:
    """A pass over rows of one length, whose gradient is zero."""
    rows, response = list(range(num_rows)), [0] * max(1, length // 2)
    prompt, num_tokens = [0] * max(1, length - len(response)), num_rows * length
    part = padded_rows([prompt] * num_rows, rows, [response] * num_rows).to(scorer.policy.device)
    micro_batch = MicroBatch(rows, False, num_tokens, num_tokens)
    backward(scorer.training_forward(part, micro_batch, is_observed=False).logprobs.sum() * 0)


def _bytes_to_come(scorer: Scorer, optimizers: Sequence[Any]) -> int:
    """What optimizers and reference will take on the device, and have not yet; shards on the host take nothing."""
    num_bytes = 0
    for optimizer in filter(None, optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in parameters if parameter.device.type == scorer.policy.device.type]
        if not optimizer.state:
            num_bytes += moments(optimizer) * sum(_num_bytes(parameter) for parameter in parameters)
        num_bytes += sum(_num_bytes(parameter) for parameter in parameters if parameter.grad is None)
    if scorer.reference is not None and not scorer.is_sharded and scorer.reference.device != scorer.policy.device:
        num_bytes += sum(_num_bytes(parameter) for parameter in scorer.reference.parameters())
    return num_bytes


def _num_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter on this rank."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()
