"""Watch a run: kernels with their flop and bytes, and the bytes that are live.

Works alike on fake and real tensors. It does not know layers or what a run is for.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.measure.flop import count_flop
from planner.operators import is_random_operator
from planner.profile import OperatorCount
from planner.storages import LiveStorages, storage_key, tensors_in

__all__ = ["KernelCounter", "SavedTensors"]

# They reserve memory and launch nothing.
_NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.lift_fresh")


class KernelCounter(TorchDispatchMode):
    """Counts kernels, and the peak of bytes in storages that the run itself makes."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts: Counter[tuple[int, int, str, bool]] = Counter()
        self._storages = LiveStorages(ignored=existing)

    @property
    def live_bytes(self) -> int:
        return self._storages.live_bytes

    @property
    def peak_bytes(self) -> int:
        return self._storages.peak_bytes

    @property
    def counts(self) -> tuple[OperatorCount, ...]:
        """Equal kernels together, in order of first appearance."""
        return tuple(
            OperatorCount(
                flop=flop, moved_bytes=moved, dtype=dtype, num_kernels=number, draws=draws
            )
            for (flop, moved, dtype, draws), number in self._counts.items()
        )

    def restart(self) -> int:
        """Forget the counts and the peak; live storages stay known. Returns the live bytes."""
        self._counts.clear()
        return self._storages.restart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        outputs = list(tensors_in(result))
        if _is_kernel(func, inputs, outputs):
            flop = count_flop(func, args, kwargs, result)
            moved = _moved_bytes([*inputs, *outputs])
            draws = is_random_operator(func, args, kwargs)
            self._counts[flop, moved, _dtype([*outputs, *inputs]), draws] += 1
        for tensor in outputs:
            self._storages.watch(tensor)
        return result


def _is_kernel(
    func: torch._ops.OpOverload, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> bool:
    """Whether the call launches work: views and reservations of memory do not."""
    if not outputs or func.is_view or str(func).startswith(_NO_KERNEL):
        return False
    if func._schema.is_mutable:
        return True
    known = {storage_key(tensor) for tensor in inputs}
    return any(storage_key(tensor) not in known for tensor in outputs)


def _moved_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once; of an expanded or sliced view only what it holds."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
        sizes[storage._cdata] = max(size, sizes.get(storage._cdata, 0))
    return sum(sizes.values())


def _dtype(tensors: Sequence[torch.Tensor]) -> str:
    """The floating type of the kernel, of its result first; else the result's type."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return str((floating or tensors)[0].dtype).removeprefix("torch.")


class SavedTensors:
    """Storages that autograd keeps for backward, by weak reference."""

    def __init__(self) -> None:
        self._kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = weakref.ref(storage)
        return tensor

    def storages(self) -> dict[int, int]:
        """Storage -> bytes, of those that are still alive."""
        alive = {key: reference() for key, reference in self._kept.items()}
        return {key: storage.nbytes() for key, storage in alive.items() if storage is not None}
