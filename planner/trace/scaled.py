"""The LayerGraph of a micro-batch size that was not traced, from two sizes that were.

Tracing a model of a hundred layers takes seconds for each size, and a search wants many. Two graphs
of one model differ in sizes alone: whole numbers in the same places, which grow in a straight line
with the size. Where anything else differs there is no third graph to be had this way.
`same_graph` tells whether a guess came true. This module knows values. It does not know models.
"""

import dataclasses
from typing import Any

from planner.graph import LayerGraph

__all__ = ["same_graph", "scaled_graph"]


class _NotScaledError(Exception):
    """Something but a size differs."""


def scaled_graph(one: LayerGraph, other: LayerGraph, size: int) -> LayerGraph | None:
    """The graph at `size` on the line through two others; None where there is no such line."""
    line = _Line(one.micro_batch_size, other.micro_batch_size, size)
    try:
        found = line.value(_without_signatures(one), _without_signatures(other))
    except _NotScaledError:
        return None
    assert isinstance(found, LayerGraph)
    return found


def same_graph(one: LayerGraph, other: LayerGraph) -> bool:
    """Whether two graphs are equal, and the same layers of each are alike."""
    return _without_signatures(one) == _without_signatures(other)


def _without_signatures(graph: LayerGraph) -> LayerGraph:
    """With the number of the first layer that is alike in place of each layer's signature, which
    is made of the sizes."""
    first: dict[str, int] = {}
    layers = tuple(
        dataclasses.replace(layer, signature=f"as layer {first.setdefault(layer.signature, index)}")
        for index, layer in enumerate(graph.layers)
    )
    return dataclasses.replace(graph, layers=layers)


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """Through the sizes of two graphs, to a third."""

    one: int
    other: int
    size: int

    def value(self, one: Any, other: Any) -> Any:
        """What stands at the same place in the third graph."""
        if type(one) is not type(other):
            raise _NotScaledError
        if type(one) is int:
            return self._number(one, other)
        if isinstance(one, tuple | list):
            if len(one) != len(other):
                raise _NotScaledError
            return type(one)(map(self.value, one, other))
        if isinstance(one, dict):
            if list(one) != list(other):
                raise _NotScaledError
            return {key: self.value(value, other[key]) for key, value in one.items()}
        if isinstance(one, slice):
            ends = ((one.start, other.start), (one.stop, other.stop), (one.step, other.step))
            return slice(*(self.value(*pair) for pair in ends))
        if dataclasses.is_dataclass(one) and not isinstance(one, type):
            names = [field.name for field in dataclasses.fields(one) if field.init]
            parts = {name: self.value(getattr(one, name), getattr(other, name)) for name in names}
            return type(one)(**parts)
        if one != other:
            raise _NotScaledError
        return one

    def _number(self, one: int, other: int) -> int:
        found, rest = divmod((other - one) * (self.size - self.one), self.other - self.one)
        if rest or one + found < 0 <= min(one, other):
            raise _NotScaledError
        return one + found
