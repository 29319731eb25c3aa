"""Other orders of a model's layers that train bitwise alike, for models whose layers branch.

Stages are contiguous in the order of layers. Where branches run side by side (two towers, a
decoder's embedding beside the encoder), other orders have other contiguous parts: balanced better,
with fewer tensors across the cuts, or with the layers that share a parameter in one stage.

Autograd adds the gradients of a tensor in the reverse order of its readers. So an order is
exchangeable only if it keeps the order of the readers of every such tensor, of the users of every
shared parameter, and of whatever else layers share. This module knows the LayerGraph and what its
layers cost. It does not know the solver.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from planner.graph import LayerGraph, LayerNode
from planner.solve.dag import DagNode, DagProblem, Transfer
from planner.solve.dag_solve import solve_dag

__all__ = ["exact_orders", "precedences"]

Order = tuple[int, ...]
PART_SECONDS = 2.0
MAX_SETS = 5_000
"""Of the search for the parts that give an order: it needs to be good, not proved."""


def precedences(graph: LayerGraph) -> tuple[tuple[int, int], ...]:
    """(earlier, later) pairs of layers that every exchangeable order keeps."""
    num_layers = len(graph.layers)
    found: set[tuple[int, int]] = {(layer, num_layers - 1) for layer in range(num_layers - 1)}
    for name, readers in graph.readers.items():
        found |= {(graph.makers[name], reader) for reader in readers}
        if graph.tensor_specs[name].requires_grad:
            found |= set(itertools.pairwise(readers))
    users: dict[Hashable, list[int]] = defaultdict(list)
    counted = sum(layer.buffer_bytes for layer in graph.layers)
    for index, layer in enumerate(graph.layers):
        for shared in _shared(layer):
            users[shared].append(index)
        if layer.buffer_bytes and counted > graph.buffer_bytes:
            users["buffers"].append(index)  # some are counted twice: layers share them
        if layer.mutated_inputs:
            # What is changed in place may be part of another tensor: nothing passes such a layer.
            found |= {(earlier, index) for earlier in range(index)}
            found |= {(index, later) for later in range(index + 1, num_layers)}
    for layers in users.values():
        found |= set(itertools.pairwise(layers))
    return tuple(sorted(found))


def _shared(layer: LayerNode) -> set[Hashable]:
    """Names of what a layer uses and another layer may use too: parameters, modules, buffers."""
    shared: set[Hashable] = {("parameter", name) for name in layer.parameters}
    for statement in layer.code:
        if statement.function == "layer":
            shared.add(("module", statement.path))
        elif statement.function == "buffer":
            shared.add(("buffer", statement.arguments[0]))
    return shared


def exact_orders(
    graph: LayerGraph, layer_seconds: Sequence[float], bytes_per_second: float, num_parts: int
) -> tuple[Order, ...]:
    """Orders worth trying beside the traced one, each different; none where nothing branches.

    They are: that of the best contiguous parts, layers that share a parameter together, one branch
    after the other, and branches in turns.

    Args:
        graph: the model at some micro-batch size.
        layer_seconds: of each layer, forward and backward of one micro-batch.
        bytes_per_second: of the links between devices.
        num_parts: how many parts the layers will be split into.
    """
    pairs = precedences(graph)
    traced = tuple(range(len(graph.layers)))
    if set(pairs).issuperset(itertools.pairwise(traced)):
        return ()
    before: dict[int, set[int]] = {layer: set() for layer in traced}
    for name, readers in graph.readers.items():
        for reader in readers:
            before[reader].add(graph.makers[name])
    kin = {
        layer: {
            other for users in graph.tied_parameters.values() if layer in users for other in users
        }
        for layer in traced
    }
    orders = (
        _of_parts(graph, pairs, layer_seconds, bytes_per_second, num_parts),
        _greedy(pairs, lambda layer, placed: (kin[layer].isdisjoint(placed), layer)),
        _greedy(pairs, lambda layer, placed: (-_latest(before[layer], placed), layer)),
        _greedy(pairs, lambda layer, placed: (_latest(before[layer], placed), layer)),
    )
    return tuple(order for order in dict.fromkeys(orders) if order != traced)


def _latest(layers: Iterable[int], placed: Mapping[int, int]) -> int:
    """Where the last of these layers stands; all are placed."""
    return max((placed[layer] for layer in layers), default=-1)


def _greedy(
    pairs: Iterable[tuple[int, int]], key: Callable[[int, Mapping[int, int]], tuple[Any, ...]]
) -> Order:
    """The order that always takes, of the layers that are ready, the one with the least key.

    `key` is given the layer, and the places of those before it.
    """
    missing: Counter[int] = Counter(later for _, later in pairs)
    after: dict[int, list[int]] = defaultdict(list)
    for earlier, later in pairs:
        after[earlier].append(later)
    ready = {layer for layer in after if not missing[layer]}
    placed: dict[int, int] = {}
    while ready:
        layer = min(ready, key=lambda layer: key(layer, placed))
        ready.remove(layer)
        placed[layer] = len(placed)
        for later in after[layer]:
            missing[later] -= 1
            if not missing[later]:
                ready.add(later)
    return tuple(placed)


def _of_parts(
    graph: LayerGraph,
    pairs: tuple[tuple[int, int], ...],
    layer_seconds: Sequence[float],
    bytes_per_second: float,
    num_parts: int,
) -> Order:
    """The layers part by part, each as traced, of the parts whose largest load is least."""
    transfers = tuple(
        Transfer(
            maker=graph.makers[name],
            readers=readers,
            seconds=graph.tensor_specs[name].num_bytes
            * (2 if graph.tensor_specs[name].requires_grad else 1)
            / bytes_per_second,
        )
        for name, readers in graph.readers.items()
        if readers
    )
    problem = DagProblem(
        nodes=tuple(DagNode(accelerator_seconds=seconds) for seconds in layer_seconds),
        edges=pairs,
        transfers=transfers,
        num_accelerators=num_parts,
    )
    parts = solve_dag(problem, time_limit_seconds=PART_SECONDS, max_sets=MAX_SETS).parts
    return tuple(node for part in parts for node in part.nodes)
