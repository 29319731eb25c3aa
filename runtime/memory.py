"""Peak memory of a step, measured.

On CUDA the allocator knows it. On the CPU every live storage is followed while a step runs, which
slows that step down; so it is done for one step, whose time does not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.storages import LiveStorages, tensors_in

__all__ = ["PeakMemory", "peak_memory"]


class PeakMemory:
    """Filled when the measured block ends."""

    num_bytes = 0


class _Watcher(TorchDispatchMode):
    """Follows what operators make."""

    def __init__(self, storages: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._storages.watch(tensor)
        return result


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
    with _Watcher(storages):
        yield peak
    peak.num_bytes = storages.peak_bytes
