"""Freed memory on a CPU: kept with the process, or given back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
_MAPPINGS = 2**16  # glibc's own M_MMAP_MAX


def keep_freed_memory(grow_bytes: int = 2**28) -> bool:
    """Tell glibc not to hand freed memory back to the system.

    By default every large tensor on a CPU is a fresh mapping, whose pages the kernel clears one by one when they are
    first touched. A training step frees and asks for the same gigabytes again and again; keeping them halves its time.
    The price is that the process holds the peak of its memory.

    Args:
        grow_bytes: how much the heap grows at a time.

    Returns:
        Whether the allocator took the settings; False on systems without glibc.
    """
    if (glibc := _glibc()) is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: grow_bytes}
    return all([glibc.mallopt(name, value) for name, value in settings.items()])


def give_back_freed_memory(mapped_bytes: int = 2**20) -> bool:
    """Tell glibc to hand what it keeps to the system, and from now on every large tensor when it is freed.

    The opposite of `keep_freed_memory`, and slower. Memory that the system counts is then memory in use, and can be
    measured.

    Args:
        mapped_bytes: size from which a tensor is a mapping of its own, which ends with it.

    Returns:
        Whether the allocator took the settings; False on systems without glibc.
    """
    if (glibc := _glibc()) is None:
        return False
    settings = {_M_MMAP_MAX: _MAPPINGS, _M_MMAP_THRESHOLD: mapped_bytes}
    taken = all([glibc.mallopt(name, value) for name, value in settings.items()])
    glibc.malloc_trim(0)  # tells whether there was something to hand back
    return taken


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
