"""What operators that move elements do to axes: views, slices, joins, indexing.

Named by torch's operator packets. This module knows layouts. It does not know arithmetic.
"""

from collections.abc import Callable, Mapping

from planner.measure.split_call import Call, Value

__all__ = ["along"]

Rule = Callable[[Call], None]


def _view(call: Call) -> None:
    call.is_linear = True
    source, out = call.args[0], call.outputs[0]
    if source.dims is not None:
        for index, dim in enumerate(call.axes.regroup(source.dims, out.shape)):
            call.axes.unite(dim, out.dim(index))


def _permuted(call: Call) -> None:
    call.is_linear = True
    source, out = call.args[0], call.outputs[0]
    rank = len(source.shape)
    order = list(range(rank))
    if call.name == "permute":
        order = [index % rank for index in call.args[1]]
    elif rank > 1:
        one, other = (0, 1) if call.name == "t" else (call.args[1] % rank, call.args[2] % rank)
        order[one], order[other] = order[other], order[one]
    for index, origin in enumerate(order):
        call.same(source, origin, out, index)


def along(position: int, name: str, rule: Callable[[Call, Value, Value, int], None]) -> Rule:
    """All dimensions stay but one, for which `rule` speaks."""

    def apply(call: Call) -> None:
        dim = int(call.argument(position, name, 0))
        for source in call.live:
            for out in call.outputs:
                if len(out.shape) == len(source.shape) and source.shape:
                    call.like(source, out, but=[dim])
                    rule(call, source, out, dim % len(source.shape))

    return apply


def _part(call: Call, source: Value, out: Value, dim: int) -> None:
    """A slice: split only together with what it is a part of."""
    call.is_linear = True
    if source.dims is None or out.dims is None:
        return
    if source.shape[dim] == out.shape[dim]:
        call.axes.unite(source.dims[dim], out.dims[dim])
    else:
        call.axes.tie(source.dims[dim], out.dims[dim])


def _needs(call: Call, source: Value, out: Value, dim: int) -> None:
    call.whole(source, dim)
    call.whole(out, dim)


def _removed(call: Call) -> None:
    """select, unbind: one dimension goes, and was needed whole."""
    call.is_linear = True
    source = call.args[0]
    dim = int(call.argument(1, "dim", 0)) % len(source.shape)
    call.whole(source, dim)
    for out in call.outputs:
        for index in range(len(out.shape)):
            call.same(source, index + (index >= dim), out, index)


def _select_backward(call: Call) -> None:
    call.is_linear = True
    gradient, out = call.args[0], call.outputs[0]
    dim = int(call.args[2]) % len(out.shape)
    call.whole(out, dim)
    for index in range(len(gradient.shape)):
        call.same(gradient, index, out, index + (index >= dim))


def _slice_backward(call: Call) -> None:
    gradient, out = call.args[0], call.outputs[0]
    dim = int(call.args[2]) % len(out.shape)
    call.like(gradient, out, but=[dim])
    _part(call, gradient, out, dim)


def _stack(call: Call) -> None:
    call.is_linear = True
    out = call.outputs[0]
    dim = int(call.argument(1, "dim", 0)) % len(out.shape)
    call.whole(out, dim)
    for value in call.live:
        for index in range(len(value.shape)):
            call.same(value, index, out, index + (index >= dim))


def _expand(call: Call) -> None:
    call.is_linear = True
    call.like(call.args[0], call.outputs[0])


def _repeat(call: Call) -> None:
    call.is_product = True
    source, out = call.args[0], call.outputs[0]
    call.like(source, out)
    for index in range(-1, -len(source.shape) - 1, -1):
        if source.shape[index] != out.shape[index]:
            _needs(call, source, out, index)


def _padded(call: Call) -> None:
    call.is_linear = True
    source, out = call.args[0], call.outputs[0]
    for index in range(len(source.shape)):
        if source.shape[index] == out.shape[index]:
            call.same(source, index, out, index)
        else:
            _needs(call, source, out, index)


def _complex(call: Call) -> None:
    """view_as_complex, view_as_real: pairs in the last dimension."""
    call.is_linear = True
    source, out = call.args[0], call.outputs[0]
    rank = min(len(source.shape), len(out.shape))
    for index in range(rank):
        call.same(source, index, out, index)
    for value in (source, out):
        call.whole(value, *range(rank, len(value.shape)))


def _indexed(call: Call) -> None:
    """index: dimensions that tensors index are needed whole; the others stay."""
    call.is_product = True
    source, places, out = call.args[0], call.args[1], call.outputs[0]
    used = [i for i, place in enumerate(places) if place is not None]
    call.whole(source, *used)
    kept = [i for i in range(len(source.shape)) if i not in used]
    rank = max(len(place.shape) for place in places if place is not None)
    apart = used != list(range(used[0], used[-1] + 1))
    first = 0 if apart else used[0]
    for position, index in enumerate(kept):
        place = position if not apart and index < first else position + rank
        call.same(source, index, out, place)
    call.whole(out, *range(first, first + rank))


def _index_put(call: Call) -> None:
    call.is_linear = True
    target, places, values = call.args[:3]
    used = [i for i, place in enumerate(places) if place is not None]
    call.like(target, call.outputs[0])
    call.whole(call.outputs[0], *used)
    kept = [i for i in range(len(target.shape)) if i not in used]
    trailing = [i for i in kept if not used or i > used[-1]]
    for back, index in enumerate(reversed(trailing), 1):
        if back <= len(values.shape):
            call.same(values, len(values.shape) - back, call.outputs[0], index)
    call.whole(call.outputs[0], *(i for i in kept if i not in trailing))
    call.whole(values, *range(max(0, len(values.shape) - len(trailing))))


LAYOUT_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"),
        _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permuted),
    **dict.fromkeys(("slice", "cat"), along(1, "dim", _part)),
    **dict.fromkeys(("split", "split_with_sizes"), along(2, "dim", _part)),
    "slice_backward": _slice_backward,
    **dict.fromkeys(("select", "unbind"), _removed),
    "select_backward": _select_backward,
    "stack": _stack,
    "expand": _expand,
    "repeat": _repeat,
    "constant_pad_nd": _padded,
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "index_select", "index_add"),
        along(1, "dim", _needs)),
    "index": _indexed,
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), _index_put),
}  # fmt: skip
