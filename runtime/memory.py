"""Peak memory of a step, measured.

On CUDA the allocator knows it. On the CPU every live storage is followed while a step runs, which
slows that step down; so it is done for one step, whose time does not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from planner.storages import LiveStorages, StorageWatcher

__all__ = ["PeakMemory", "peak_memory"]


class PeakMemory:
    """Filled when the measured block ends."""

    num_bytes = 0


@contextmanager
def peak_memory(resident: Iterable[Tensor], device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak of live bytes in the block.

    Args:
        resident: tensors that are alive before the block and count from its start.
        device: whose memory is measured.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    storages = LiveStorages()
    for tensor in resident:
        storages.watch(tensor)
    with StorageWatcher(storages):
        yield peak
    peak.num_bytes = storages.peak_bytes
