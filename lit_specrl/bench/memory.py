"""How much memory something takes beyond what is in use."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """Measures from its making on.

    On a CPU that is resident memory of the process, buffers of the matrix library included. Freed memory that the
    process kept and uses again is not
    seen: where that may be, call `give_back_freed_memory` before the process takes any. On a GPU it is what torch's
    allocator handed out.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: on a CPU, where the system does not tell a process its memory; Linux does.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            _count_peak_from_now()
            self._start = _resident_bytes("VmRSS")

    def beyond_start(self) -> int:
        """Bytes at the peak since the start, less those in use at the start; at least 0."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _resident_bytes("VmHWM")
        return max(0, peak - self._start)


def _count_peak_from_now() -> None:
    """Sets VmHWM to VmRSS."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise ValueError(
            f"this system does not count the peak of a process's memory ({error}); run on Linux, or on a GPU"
        ) from error


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return kib * 1024
