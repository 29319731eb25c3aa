"""Bytes that are alive: storages are followed from the operator that makes them until they die.

Used on fake tensors to predict and on real ones to measure, so that both count alike. It knows
tensors. It does not know layers, plans or ranks.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveStorages", "StorageWatcher", "storage_key", "tensors_in"]


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the memory that a tensor looks at."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested lists, tuples and dicts."""
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


class LiveStorages:
    """The sum over live storages, each counted once however many tensors look at it."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        """
        Args:
            ignored: tensors whose storages do not count.
        """
        self._ignored: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.ignore(ignored)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors' storages from now until they are freed."""
        for tensor in tensors:
            self.ignore_storage(tensor.untyped_storage())

    def ignore_storage(self, storage: torch.UntypedStorage) -> None:
        """Do not count this storage from now until it is freed."""
        key = storage._cdata
        if key in self._ignored:
            return
        if key in self._alive:
            self.live_bytes -= self._alive.pop(key)[1]

        def freed(_: object) -> None:
            del self._ignored[key]

        self._ignored[key] = weakref.ref(storage, freed)

    def follows(self, key: int) -> bool:
        """Whether the storage, by its key, is alive and counts."""
        return key in self._alive

    def watch(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage from now until it is freed."""
        self.watch_storage(tensor.untyped_storage())

    def watch_storage(self, storage: torch.UntypedStorage) -> None:
        """Count this storage from now until it is freed."""
        key = storage._cdata
        if key in self._ignored or key in self._alive:
            return
        num_bytes = storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[key]
            self.live_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, freed), num_bytes
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def restart(self) -> int:
        """The peak starts anew at what is alive, which is returned."""
        self.peak_bytes = self.live_bytes
        return self.live_bytes


class StorageWatcher(TorchDispatchMode):
    """While it is entered, everything that operators make counts in `storages`."""

    def __init__(self, storages: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._storages.watch(tensor)
        return result
