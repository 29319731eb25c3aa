"""Watch a run: kernels with their flop and bytes, and the bytes that are live.

Works alike on fake and real tensors. It does not know layers or what a run is for.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.measure.classes import operator_class
from planner.measure.flop import count_flop
from planner.measure.moved import moved_bytes
from planner.measure.summary import merged_counts
from planner.operators import changed_statistics, is_random_operator
from planner.profile import Moment, OperatorCount
from planner.storages import LiveStorages, storage_key, tensors_in

__all__ = ["KernelCounter"]

# They reserve memory and launch nothing.
_NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.lift_fresh")


class KernelCounter(TorchDispatchMode):
    """Counts kernels, and the peak of bytes in storages that the run itself makes."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        """
        Args:
            existing: tensors beside the run; their bytes do not count.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels: list[OperatorCount] = []
        self._storages = LiveStorages(existing)
        self._given: dict[str, weakref.ref[torch.UntypedStorage]] = {}
        self._moments: list[tuple[int, tuple[str, ...]]] = []
        self._changed: set[int] = set()

    @property
    def live_bytes(self) -> int:
        return self._storages.live_bytes

    @property
    def kernels(self) -> tuple[OperatorCount, ...]:
        """One by one, in order."""
        return tuple(self._kernels)

    @property
    def counts(self) -> tuple[OperatorCount, ...]:
        """Equal kernels together, in order of first appearance."""
        return merged_counts(self._kernels)

    def exist(self, tensors: Iterable[torch.Tensor]) -> None:
        """From now on these exist beside the run."""
        self._storages.ignore(tensors)

    def give(self, given: Mapping[str, torch.UntypedStorage]) -> None:
        """From now on these are the run's to let go of; they do not count, whoever made them."""
        for name, storage in given.items():
            self._storages.ignore_storage(storage)

            def freed(_: object, name: str = name) -> None:
                del self._given[name]

            self._given[name] = weakref.ref(storage, freed)

    def follows(self, storage: int) -> bool:
        """Whether a storage, by its key, is alive and counts."""
        return self._storages.follows(storage)

    def changes(self, tensor: torch.Tensor, version: int) -> bool:
        """Whether the run has changed a tensor that was of this version."""
        return tensor._version != version or storage_key(tensor) in self._changed

    def restart(self) -> int:
        """Forget kernels and moments; live storages stay known. Returns the live bytes."""
        self._kernels.clear()
        self._moments = [(self._storages.live_bytes, tuple(self._given))]
        return self._storages.restart()

    def moments(self, base_bytes: int = 0) -> tuple[Moment, ...]:
        """The live bytes above `base_bytes` after each kernel, with what is still held then."""
        return tuple(
            Moment(peak_bytes=live_bytes - base_bytes, held=held)
            for live_bytes, held in self._moments
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._changed.update(map(storage_key, changed_statistics(func, args)))
        inputs = list(tensors_in((args, kwargs)))
        outputs = list(tensors_in(result))
        if _is_kernel(func, inputs, outputs):
            self._kernels.append(
                OperatorCount(
                    flop=count_flop(func, args, kwargs, result),
                    moved_bytes=moved_bytes(func, inputs, outputs),
                    dtype=_dtype([*outputs, *inputs]),
                    num_kernels=1,
                    draws=is_random_operator(func, args, kwargs),
                    kind=operator_class(func),
                )
            )
        for tensor in outputs:
            self._storages.watch(tensor)
        if outputs:
            self._moments.append((self._storages.live_bytes, tuple(self._given)))
        return result


def _is_kernel(
    func: torch._ops.OpOverload, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> bool:
    """Whether the call launches work: views and reservations of memory do not."""
    if func.is_view or str(func).startswith(_NO_KERNEL):
        return False
    if func._schema.is_mutable:
        return bool(inputs)
    known = {storage_key(tensor) for tensor in inputs}
    return any(storage_key(tensor) not in known for tensor in outputs)


def _dtype(tensors: Sequence[torch.Tensor]) -> str:
    """The floating type of the kernel, of its result first; else the result's type."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return str((floating or tensors)[0].dtype).removeprefix("torch.")
