"""Memory of a process: what is freed stays its own, and what lies in cycles is collected rarely.

A step frees what the next one allocates. Where the C library hands that back to the system in
between, the kernel clears every page again when it is touched: up to a sixth of a step on a CPU,
and more or less of it from step to step. This module knows the C library. It does not know tensors.
"""

import ctypes
import gc

__all__ = ["collect_rarely", "keep_freed_memory"]

# Of mallopt(3), which glibc alone has.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_NEW_OBJECTS = 50_000
"""Until the youngest are gone through: 700 by default, or 2000."""
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""Bytes; larger allocations go back to the system in any case."""


def keep_freed_memory() -> bool:
    """From now on for the whole process; returns whether the C library lets it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER)
    )


def collect_rarely() -> None:
    """Python looks for garbage in cycles after many more new objects than it does by itself.

    A trace makes a million small objects and little garbage, and a fifth of its time went there.
    """
    gc.set_threshold(_NEW_OBJECTS, 20, 20)
