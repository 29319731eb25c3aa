"""Bytes that one kernel reads and writes.

Of each argument it counts what the kernel must touch: distinct elements of a view, the rows that a
lookup takes from a table, and a tensor changed in place both ways. It does not know caches.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import torch

__all__ = ["moved_bytes"]

_OVERWRITES = frozenset({
    "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_",
    "log_normal_", "geometric_", "cauchy_",
})  # fmt: skip
"""Kernels in place that write what was there without reading it."""
_BAGS = frozenset({"_embedding_bag", "_embedding_bag_forward_only"})
_LOOKUPS = _BAGS | {"embedding", "index", "_unsafe_index", "index_select", "gather", "take"}
"""Kernels that read, of their first argument, only the elements that others point at."""
_SCATTERS = frozenset({"index_put_", "_index_put_impl_", "index_add_", "scatter_", "scatter_add_"})
"""Kernels that touch, of the argument they change, only the elements that others point at."""


def moved_bytes(
    func: torch._ops.OpOverload, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> int:
    """Read plus written bytes of one call, by its tensor arguments and results."""
    name = _packet_name(func)
    if name in _LOOKUPS:
        return _lookup_bytes(name, inputs, outputs)
    if name in _SCATTERS:
        changed = min(_touched_bytes(inputs[0]), _touched_bytes(inputs[-1]))
        return _distinct_bytes(inputs[1:]) + 2 * changed
    read = inputs[1:] if name in _OVERWRITES else inputs
    # An argument changed in place is among the results too.
    written = outputs if outputs or not func._schema.is_mutable else inputs
    return _distinct_bytes(read) + _distinct_bytes(written)


@cache
def _packet_name(func: torch._ops.OpOverload) -> str:
    return str(func._overloadpacket.__name__)


def _lookup_bytes(
    name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> int:
    table, pointers = inputs[0], inputs[1:]
    # A bag sums the rows of its indices: a row for each, however many bags there are.
    rows = pointers[0].numel() * math.prod(table.shape[1:])
    taken = rows if name in _BAGS else outputs[0].numel()
    read = taken * table.element_size() + _distinct_bytes(pointers)
    return read + _distinct_bytes(outputs)


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each view once, and of all views of one storage no more than it holds."""
    seen: set[tuple[object, ...]] = set()
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        view = (key, tensor.storage_offset(), tensor.shape, tensor.stride())
        if view not in seen:
            seen.add(view)
            found[key] = min(storage.nbytes(), found.get(key, 0) + _touched_bytes(tensor))
    return sum(found.values())


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor's elements; those of expanded dimensions once."""
    if not tensor.numel():
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, step in sizes if step) * tensor.element_size()
