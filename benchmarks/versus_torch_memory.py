"""Live bytes of a process by contender: the same count for all.

Storages are followed from the operator that makes or first touches them until they die. Their sizes
are read again at every operator, because FSDP2 gives memory back by resizing storages in place.
What libraries allocate outside of torch (gloo's own buffers) is not seen. This module knows
tensors. It does not know who trains.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.storages import tensors_in

__all__ = ["Memory"]

PLAIN = (Tensor, torch.nn.Parameter)


class Memory:
    """The storages that one contender has made and still holds."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        """`ignored`: tensors that every contender gets, such as the batch."""
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._lock = threading.Lock()
        self._is_watching = False
        self.peak_bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What operators of this thread make in the block counts."""
        self._is_watching = True
        try:
            with _Watcher(self):
                yield
        finally:
            self._is_watching = False

    @contextmanager
    def watching_here(self) -> Iterator[None]:
        """The same in another thread, as long as `watching` is entered in the first."""
        with _Watcher(self) if self._is_watching else nullcontext():
            yield

    def restart(self) -> None:
        """The peak starts anew."""
        self.peak_bytes = 0
        self.note(())

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Follow these tensors' storages, and take the present sum into the peak."""
        with self._lock:
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ignored:
                    self._alive.setdefault(storage._cdata, weakref.ref(storage))
            total = 0
            for key, reference in list(self._alive.items()):
                found = reference()
                if found is None:
                    del self._alive[key]
                else:
                    total += found.nbytes()
            self.peak_bytes = max(self.peak_bytes, total)


class _Watcher(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on plain tensors come here
        result = func(*args, **(kwargs or {}))
        if any(kind not in PLAIN for kind in types):
            return result  # fake tensors, by which DTensors find shapes
        self._memory.note(tensors_in((args, kwargs, result)))
        return result
