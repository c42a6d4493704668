"""Chunked log-probs against logits in full: memory, time, gradient."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_specrl import allocator
from lit_specrl.bench.memory import PeakMemory
from lit_specrl.bench.report import Ratio, Report, check_at_least_one, describe_hardware, resolve_device, spread
from lit_specrl.models.logprobs import token_logprobs

_GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # bfloat16 keeps 8 bits, an error of 0.004 per factor

Implementation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] from the logits of all tokens, with no more copies of [T, V] than autograd needs.

    Args:
        hidden: [T, H] last hidden states.
        head: [V, H] rows of the output head.
        targets: [T] long, token ids.
    """
    logprobs = torch.log_softmax(hidden @ head.T, -1, dtype=torch.float32)  # [T, V]
    with torch.no_grad():
        entropy = logprobs.exp().mul_(logprobs).sum(-1).neg_()  # [T]
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


IMPLEMENTATIONS: dict[str, Implementation] = {"chunked": token_logprobs, "plain": plain_logprobs}


def bench_logprobs(
    vocab_size: int = 150_000,
    num_tokens: int = 8192,
    hidden_size: int = 576,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    repeats: int = 5,
    keep_freed_memory: bool = False,
) -> Report:
    """Compare the log-probs of the library, computed in chunks, with logits in full.

    A pass is forward (log-probs and entropies), backward and the addition to existing gradients. Each version has a
    process of its own, where inputs and gradients are in place before anything is measured. Peak extra memory is that
    of the first pass (`PeakMemory`): of the process on a CPU, of torch's allocator on a GPU.
    Seconds are those of the passes after it, chunked and plain in turn. If the plain version does not fit the free
    memory, it is not run, and the report says so.

    Gradients differ by norm(chunked - plain) / norm(plain); the command fails above 1e-4 (float32) or 2e-2 (bfloat16).

    Args:
        vocab_size: words of the output head, V.
        num_tokens: tokens whose log-probs are taken, T.
        hidden_size: width of the hidden states, H.
        dtype: of hidden states, head and logits; both versions reduce in float32.
        device: where to compute; "auto" takes a GPU if there is one.
        repeats: timed passes of each version.
        keep_freed_memory: on a CPU, let the timed passes use again what the passes before them freed, as training does
            (`lit_specrl.allocator`). The plain version gains most, and may hold five copies of the logits instead of
            three, because glibc leaves holes between them.
    """
    check_at_least_one(vocab_size=vocab_size, num_tokens=num_tokens, hidden_size=hidden_size, repeats=repeats)
    problem = Problem(vocab_size, num_tokens, hidden_size, dtype, resolve_device(device), keep_freed_memory)
    if problem.device == "cpu" and sys.platform != "linux":
        raise ValueError("--device cpu: peak memory is read from /proc, which only Linux has")
    try:
        measured, shortage = _measure(problem, repeats)
    except BrokenProcessPool as error:
        raise ValueError("the system ended a measuring process, most likely for want of memory") from error
    rows = {name: measurement.as_row() for name, measurement in measured.items()}
    tables = {"measured": [{"version": name, **row} for name, row in rows.items()]}
    failures = []
    if shortage:
        tables["measured"].append({"version": "plain", **dict.fromkeys(rows["chunked"])})
    else:
        differences = _gradient_differences(measured["chunked"].gradients, measured["plain"].gradients)
        tables["compared"] = [
            {
                "memory_plain_over_chunked": Ratio(rows["plain"]["peak_extra_mib"] / rows["chunked"]["peak_extra_mib"]),
                "time_chunked_over_plain": Ratio(rows["chunked"]["seconds_median"] / rows["plain"]["seconds_median"]),
                **{f"{name}_gradient_difference": value for name, value in differences.items()},
            }
        ]
        failures = [
            f"the gradients of {name} differ by {value:.2g} of their norm"
            for name, value in differences.items()
            if not value <= _GRADIENT_TOLERANCE[dtype]  # written so that NaN fails
        ]
    return Report(
        hardware=describe_hardware(problem.device),
        torch_version=torch.__version__,
        settings={"benchmark": "logprobs", **asdict(problem), "repeats": repeats},
        tables=tables,
        notes=[shortage] if shortage else [],
        failures=failures,
    )


# --------------------------------------------------------------------------------------------------- in this process


@dataclass
class _Measurement:
    """What is known of one version."""

    peak_extra_bytes: int
    seconds: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def as_row(self) -> dict[str, float]:
        return {"peak_extra_mib": self.peak_extra_bytes / 2**20, **spread(self.seconds)}


def _measure(problem: Problem, repeats: int) -> tuple[dict[str, _Measurement], str | None]:
    """Measurements by version, and why the plain one is missing, if it is."""
    with ExitStack() as processes:
        workers = {"chunked": processes.enter_context(_worker(problem))}
        measured = {"chunked": _first_pass(workers, "chunked", problem)}
        shortage = _shortage(problem)
        if shortage is None:
            workers["plain"] = processes.enter_context(_worker(problem))
            measured["plain"] = _first_pass(workers, "plain", problem)
        for repeat in range(1, repeats + 1):
            for name, worker in workers.items():
                elapsed_s = worker.submit(_timed_pass, IMPLEMENTATIONS[name], problem).result()
                measured[name].seconds.append(elapsed_s)
                print(f"{name}, repeat {repeat} of {repeats}: {elapsed_s:.2f} s", file=sys.stderr)
        for name, worker in workers.items():
            arrays = worker.submit(_gradients, problem).result()
            measured[name].gradients = {of: torch.from_numpy(array) for of, array in arrays.items()}
    return measured, shortage


def _worker(problem: Problem) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(torch.get_num_threads(), os.getpid()),
    )


def _prepare_worker(num_threads: int, parent: int) -> None:
    """Take as many threads as the parent, and end with it: it may be killed, and a gigabyte would stay behind."""
    torch.set_num_threads(num_threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_pass(workers: dict[str, ProcessPoolExecutor], name: str, problem: Problem) -> _Measurement:
    return _Measurement(workers[name].submit(_extra_memory_of_first_pass, IMPLEMENTATIONS[name], problem).result())


def _shortage(problem: Problem) -> str | None:
    """Why the plain version cannot run here, if it cannot."""
    needed, free = problem.plain_bytes, _free_bytes(problem.device)
    if needed <= free:
        return None
    return (
        f"The plain version was not run: it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. "
        "Take fewer tokens with --num_tokens to compare the two."
    )


def _free_bytes(device: str) -> int:
    """Memory that can be taken without another process being ended for it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limits = [
        int(file.read_text())
        for name in ("memory.max", "memory/memory.limit_in_bytes")  # of the container: cgroup v2, v1
        if (file := Path("/sys/fs/cgroup") / name).exists() and file.read_text().strip().isdigit()
    ]
    return min(available, *limits)


def _gradient_differences(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference by norm of the reference."""
    return {name: float((ours[name] - gradient).norm() / gradient.norm()) for name, gradient in reference.items()}


# ------------------------------------------------------------------------------------------ in the process of a version


class _Inputs(NamedTuple):
    hidden: Tensor
    """[T, H]"""
    head: Tensor
    """[V, H], scaled so that logits have variance 1."""
    targets: Tensor
    """[T] long"""
    upstream: Tensor
    """[T] float32, the gradient of each log-prob, as different as advantages are."""


@dataclass(frozen=True)
class Problem:
    """One size of the computation."""

    vocab_size: int
    num_tokens: int
    hidden_size: int
    dtype: str
    device: str
    keep_freed_memory: bool

    @property
    def plain_bytes(self) -> int:
        """What a process with the plain version takes: log-probs, their gradient and that of the logits in float32
        (five copies with freed memory kept), head, its gradient and the addend to it in float32, and half a GiB for the
        process.
        """
        copies = 5 if self.keep_freed_memory else 3
        return 4 * self.vocab_size * (copies * self.num_tokens + 3 * self.hidden_size) + 2**29

    @functools.cache  # noqa: B019 (a frozen value; the process ends with it)
    def inputs(self) -> _Inputs:
        """The same numbers in every process, gradients in place."""
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.dtype)
        hidden = torch.randn(self.num_tokens, self.hidden_size, generator=generator, dtype=dtype)
        head = torch.randn(self.vocab_size, self.hidden_size, generator=generator, dtype=dtype)
        head /= self.hidden_size**0.5
        targets = torch.randint(self.vocab_size, (self.num_tokens,), generator=generator)
        upstream = torch.randn(self.num_tokens, generator=generator)
        inputs = _Inputs(*(tensor.to(self.device) for tensor in (hidden, head, targets, upstream)))
        for parameter in (inputs.hidden, inputs.head):
            parameter.requires_grad_().grad = torch.ones_like(parameter)  # written, so that the pages are there
        return inputs


def _timed_pass(implementation: Implementation, problem: Problem) -> float:
    """Seconds of forward and backward."""
    hidden, head, targets, upstream = problem.inputs()
    for parameter in (hidden, head):
        assert parameter.grad is not None
        parameter.grad.zero_()
    _synchronize(problem.device)
    started_at = time.perf_counter()
    logprobs, _ = implementation(hidden, head, targets)
    logprobs.backward(upstream)
    _synchronize(problem.device)
    return time.perf_counter() - started_at


def _extra_memory_of_first_pass(implementation: Implementation, problem: Problem) -> int:
    """Bytes at the peak beyond what was there before."""
    _timed_pass(implementation, replace(problem, vocab_size=64, num_tokens=8))  # code and thread stacks are loaded here
    problem.inputs()
    memory = PeakMemory(problem.device)
    _timed_pass(implementation, problem)
    extra = memory.beyond_start()
    if problem.keep_freed_memory:
        allocator.keep_freed_memory()
        _timed_pass(implementation, problem)  # touches the memory that the timed passes use again
    return extra


def _gradients(problem: Problem) -> dict[str, Any]:
    """float32 arrays: tensors would go through shared memory, of which containers have little."""
    inputs = problem.inputs()
    gradients = {"hidden": inputs.hidden.grad, "head": inputs.head.grad}
    return {name: gradient.float().cpu().numpy() for name, gradient in gradients.items() if gradient is not None}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
