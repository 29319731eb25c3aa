"""Python's garbage collector waits while something is measured: it runs at moments of its own.

Tensors in reference cycles would die sooner or later from run to run, and its pauses would fall on
some layer at random.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["no_collection"]


@contextmanager
def no_collection() -> Iterator[None]:
    """What lies in reference cycles stays until the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
