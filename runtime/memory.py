"""Peak memory of a step, measured.

On CUDA the allocator knows it. On the CPU every live storage is followed while a step runs, which
slows that step down; so it is done for one step, whose time does not count.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PeakMemory", "peak_memory"]


class PeakMemory:
    """Filled when the measured block ends."""

    num_bytes = 0


class _StorageTracker(TorchDispatchMode):
    """Adds up live storages as operators make them and as they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._live_bytes = 0
        self.peak_bytes = 0

    def follow(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._alive or tensor.device.type != "cpu":
            return
        num_bytes = storage.nbytes()

        def forget(_: object) -> None:
            if self._alive.pop(identity, None) is not None:
                self._live_bytes -= num_bytes

        self._alive[identity] = weakref.ref(storage, forget)
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
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
    tracker = _StorageTracker()
    for tensor in resident:
        tracker.follow(tensor)
    with tracker:
        yield peak
    peak.num_bytes = tracker.peak_bytes
