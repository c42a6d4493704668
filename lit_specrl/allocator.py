"""Memory that stays with the process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory(grow_bytes: int = 2**28) -> bool:
    """Tell glibc not to hand freed memory back to the system.

    By default every large tensor on a CPU is a fresh mapping, whose pages the kernel clears one by one when they are first
    touched. A training step frees and asks for the same gigabytes again and again; keeping them halves its time. The price is that
    the process holds the peak of its memory.

    Args:
        grow_bytes: how much the heap grows at a time.

    Returns:
        Whether the allocator took the settings; False on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_TOP_PAD, grow_bytes)])
