"""Watch one layer run, forward and backward, for what tensor parallelism could split.

Every operator's effect on the axes of its tensors is remembered, and what memory they take. A
tensor is known by its memory and its layout in it, so that what autograd keeps and hands back is
still the tensor that it was. This module knows one run. It does not know which layer it is.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from planner.measure.axes import Axes
from planner.measure.counter import KernelCounter
from planner.measure.split_call import Call, Value
from planner.measure.split_choice import Choice, Operation
from planner.measure.split_rules import apply_rule
from planner.profile import OperatorCount

__all__ = ["SplitRecorder", "Splits"]

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What splitting a layer does to its profile."""

    forward: tuple[OperatorCount, ...]
    """Equal kernels together, in order of first appearance."""
    backward: tuple[OperatorCount, ...]
    forward_all_reduce_bytes: tuple[int, ...]
    backward_all_reduce_bytes: tuple[int, ...]
    parameters: tuple[str, ...]
    """Names of the parameters of which every rank holds a part."""
    boundary: dict[str, int | None]
    """Boundary tensor -> dimension in which it is split; None: whole."""
    saved_share: float
    """Of the bytes kept for backward, the part that is split."""
    forward_peaks: tuple[tuple[float, float], ...]
    """(whole, split) bytes at the moments that may be the peak, as shares of the unsplit peak."""
    backward_peaks: tuple[tuple[float, float], ...]
    pieces: int
    """Degrees must divide this: heads, and whatever else is worked on in pieces; 0: any degree."""


class SplitRecorder(TorchDispatchMode):
    """Watches one layer run, and says what can be split."""

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        """
        Args:
            parameters: what the layer may split.
            inputs: boundary tensors; those that require no gradient are constants.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = KernelCounter()
        self._axes = Axes()
        self._values: list[Value] = []
        self._known: dict[_Key, int] = {}
        self._by_storage: dict[int, list[_Key]] = {}
        # Identity of a storage -> a weak reference to it, and its number.
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._num_storages = 0
        self._operations: list[Operation] = []
        self._sums: set[int] = set()
        # Of forward and of backward: bytes of the storages made, and when they come and go.
        self._made: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._events: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._saved: dict[int, int] = {}
        self._is_backward = False
        self._named = {name: self._add(p, is_live=True) for name, p in parameters.items()}
        self._boundary = {
            name: self._add(tensor, is_live=tensor.requires_grad) for name, tensor in inputs.items()
        }

    def end_forward(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Forward is over, and made these boundary tensors."""
        for name, tensor in outputs.items():
            self._boundary[name] = self._look_up(tensor)
        self._is_backward = True

    def begin_backward(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Forward's values are gone but for what backward needs; gradients are added to `sums`."""
        boundary = {self._values[index].storage for index in self._boundary.values()}
        alive = {number for reference, number in self._storages.values() if reference() is not None}
        self._saved = {
            number: size
            for number, size in self._made[0].items()
            if number in alive and number not in boundary
        }
        for name, tensor in sums.items():
            index = self._add(tensor, is_live=True)
            self._values[index].dims = self._values[self._named[name]].dims
            self._sums.add(index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._counter.restart()
        result = self._counter.__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "prim":  # questions about a tensor
            self._observe(func, args, kwargs, result, next(iter(self._counter.counts), None))
        return result

    def _observe(
        self,
        func: torch._ops.OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        count: OperatorCount | None,
    ) -> None:
        leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
        read = [self._look_up(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        held = iter(read)
        given_args, given_kwargs = pytree.tree_unflatten(
            [self._values[next(held)] if isinstance(x, torch.Tensor) else x for x in leaves], tree
        )
        is_live = any(self._values[index].dims is not None for index in read)
        for tensor in _tensors(result):
            self._follow(tensor)
        outputs = [
            self._add(
                tensor, is_live=is_live and (tensor.is_floating_point() or tensor.is_complex())
            )
            for tensor in _tensors(result)
        ]
        call = Call(
            name=_name(func),
            args=given_args,
            kwargs=given_kwargs,
            outputs=[self._values[index] for index in outputs],
            axes=self._axes,
        )
        if call.name.endswith("_like") or call.name.startswith("new_"):
            # Of a tensor they read the shape alone.
            read = []
            for value in call.outputs:
                value.dims = None
        if is_live and outputs and call.outputs[0].dims is not None:
            apply_rule(call, func)
        if func._schema.is_mutable:
            self._forget_other_views(outputs)
        self._operations.append(
            Operation(
                inputs=tuple(i for i in read if self._values[i].dims is not None),
                outputs=tuple(i for i in outputs if self._values[i].dims is not None),
                count=count,
                summed=tuple(call.summed),
                small=tuple((tuple(axes), num_bytes) for axes, num_bytes in call.small),
                is_linear=call.is_linear,
                is_product=call.is_product,
                is_backward=self._is_backward,
            )
        )

    def keep_whole(self, boundary: str) -> None:
        """The boundary tensor must be whole on every rank."""
        self._axes.keep_whole(self._values[self._boundary[boundary]].axes)

    def splits(self) -> Splits:
        """The best choice of what to split."""
        choice = Choice(
            axes=self._axes,
            values=self._values,
            operations=self._operations,
            parameters=list(self._named.values()),
            sums=self._sums,
            outputs=set(self._boundary.values()),
        )
        chosen = choice.best()
        bytes_of = choice.all_reduces(chosen)
        split = {v.storage for i, v in enumerate(self._values) if choice.groups_of[i] & chosen}
        saved = sum(self._saved.values())
        split_saved = sum(size for number, size in self._saved.items() if number in split)
        forward, backward = choice.counts(chosen)
        return Splits(
            forward=forward,
            backward=backward,
            forward_all_reduce_bytes=tuple(bytes_of[0]),
            backward_all_reduce_bytes=tuple(bytes_of[1]),
            parameters=tuple(n for n, i in self._named.items() if choice.groups_of[i] & chosen),
            boundary={
                name: choice.split_dim(self._values[index], chosen)
                for name, index in self._boundary.items()
            },
            saved_share=split_saved / saved if saved else 0.0,
            forward_peaks=_peaks(self._events[0], split),
            backward_peaks=_peaks(self._events[1], split),
            pieces=choice.pieces(chosen),
        )

    def _look_up(self, tensor: torch.Tensor) -> int:
        """The value that a tensor holds now; an unknown one is a constant."""
        key = self._key(tensor)
        known = self._known.get(key)
        if known is not None:
            return known
        others = [self._known[k] for k in self._by_storage.get(key[0], ()) if k in self._known]
        live = [index for index in others if self._values[index].dims is not None]
        found = self._add(tensor, is_live=bool(live))
        # Another view of memory that holds split tensors: nothing says how they lie in it.
        for index in (found, *live) if live else ():
            self._axes.keep_whole(self._values[index].axes)
        return found

    def _add(self, tensor: torch.Tensor, *, is_live: bool) -> int:
        key = self._key(tensor)
        shape = tuple(tensor.shape)
        self._values.append(
            Value(
                shape=shape,
                num_bytes=tensor.numel() * tensor.element_size(),
                dims=[self._axes.new(size) for size in shape] if is_live else None,
                storage=key[0],
            )
        )
        self._known[key] = len(self._values) - 1
        self._by_storage.setdefault(key[0], []).append(key)
        return len(self._values) - 1

    def _forget_other_views(self, written: Sequence[int]) -> None:
        """After a write in place, other views of the same memory of another size are unknown."""
        for index in written:
            value = self._values[index]
            for key in self._by_storage[value.storage]:
                other = self._known.get(key)
                if other is None or other == index:
                    continue
                if self._values[other].num_bytes != value.num_bytes or (
                    self._values[other].dims is None and value.dims is not None
                ):
                    del self._known[key]

    def _key(self, tensor: torch.Tensor) -> _Key:
        return (
            self._number(tensor), int(tensor.storage_offset()), tuple(tensor.shape),
            tuple(tensor.stride()),
        )  # fmt: skip

    def _number(self, tensor: torch.Tensor) -> int:
        """A number for the tensor's memory, which another tensor's memory does not get later."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0]() is None:
            known = (weakref.ref(storage), self._num_storages)
            self._storages[storage._cdata] = known
            self._num_storages += 1
        return known[1]

    def _follow(self, tensor: torch.Tensor) -> None:
        """Count the memory of what an operator made until it is freed."""
        storage, made = tensor.untyped_storage(), self._made[self._is_backward]
        known = self._storages.get(storage._cdata)
        if known is not None and known[0]() is not None:
            return
        number, size = self._number(tensor), storage.nbytes()
        made[number] = size
        self._events[self._is_backward].append((number, size))

        def freed(_: object) -> None:
            self._events[self._is_backward].append((number, -size))

        self._storages[storage._cdata] = (weakref.ref(storage, freed), number)


def _name(func: torch._ops.OpOverload) -> str:
    """The packet's name, without the mark of an operator that works in place."""
    name = func._overloadpacket._qualified_op_name.rpartition("::")[2]
    return name.removesuffix("_") if func._schema.is_mutable else name


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _peaks(events: Sequence[tuple[int, int]], split: set[int]) -> tuple[tuple[float, float], ...]:
    """The moments that no other moment exceeds in both kinds of bytes."""
    live, moments = [0, 0], set[tuple[int, int]]()
    for storage, num_bytes in events:
        live[storage in split] += num_bytes
        moments.add((live[0], live[1]))
    peak = max((whole + part for whole, part in moments), default=0)
    found: list[tuple[float, float]] = []
    most = -1
    for whole, part in sorted(moments, reverse=True):
        if peak > 0 and part > most and part >= 0:
            found.append((whole / peak, part / peak))
            most = part
    return tuple(found)
