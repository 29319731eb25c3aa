"""Mixed precision in predictions: masters in the place of parameters, and the copies beside them.

State, gradient sums, their reduction and the update are those of the masters. Gathers of a
partitioned state are counted in the masters' type too, which is the most that they can move. This
module knows types of parameters. It does not know layers.
"""

from collections.abc import Sequence
from dataclasses import replace

from planner.graph import DTYPE_BYTES, LayerGraph
from planner.plan.types import Plan
from planner.precision import Precision
from planner.simulate.types import MemoryByClass

__all__ = ["master_graph", "with_compute_copies"]


def master_graph(graph: LayerGraph, precision: Precision) -> LayerGraph:
    """The graph with trained parameters of their master's type; itself without mixed precision."""
    if not precision.is_mixed:
        return graph
    return replace(
        graph,
        parameters=tuple(
            replace(p, dtype=precision.master_dtype(p.dtype)) if p.trainable else p
            for p in graph.parameters
        ),
    )


def with_compute_copies(
    memory: Sequence[MemoryByClass], plan: Plan, graph: LayerGraph, precision: Precision
) -> tuple[MemoryByClass, ...]:
    """Memory of each pipeline rank with the copies that layers compute with.

    With partition 3 the gather buffers hold them. With 1 and 2 they are what is whole in place, and
    each replica has masters of its own part alone.
    """
    if not precision.is_mixed or plan.gathers:
        return tuple(memory)
    size = DTYPE_BYTES[precision.value]
    trained = {p.name: p.num_elements for p in graph.parameters if p.trainable}
    num_parts = plan.num_replicas if plan.gathers_updates else 1
    copies = [0] * plan.num_pipeline_ranks
    for unit in plan.units:
        masters = unit.num_elements * DTYPE_BYTES[unit.dtype] if unit.trainable else 0
        elsewhere = masters - -(-masters // num_parts)
        for rank in unit.ranks:
            copies[rank] += size * sum(trained.get(name, 0) for name in unit.parameters)
            copies[rank] -= elsewhere
    return tuple(
        replace(moment, weights=moment.weights + copy)
        for moment, copy in zip(memory, copies, strict=True)
    )
