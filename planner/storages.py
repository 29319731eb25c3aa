"""Bytes that are alive: storages are followed from the operator that makes them until they die.

Used on fake tensors to predict and on real ones to measure, so that both count alike. It knows
tensors. It does not know layers, plans or ranks.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["LiveStorages", "storage_key", "tensors_in"]


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
            ignored: tensors whose storages do not count; they are kept alive.
        """
        self._ignored = list(ignored)
        self._ignored_keys = {storage_key(tensor) for tensor in self._ignored}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def watch(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored_keys or key in self._alive:
            return
        num_bytes = storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[key]
            self.live_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def restart(self) -> int:
        """The peak starts anew at what is alive, which is returned."""
        self.peak_bytes = self.live_bytes
        return self.live_bytes
