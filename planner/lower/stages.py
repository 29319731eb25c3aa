"""Stages of the plan: code, boundary tensors, and predicted cost of one micro-batch."""

import math
from collections.abc import Sequence

from planner.cluster.types import Cluster
from planner.cost import layer_seconds
from planner.graph import LayerGraph
from planner.lower.routes import Route
from planner.plan.types import StagePlan, Unit
from planner.profile import LayerProfile, Profile
from planner.solve.types import Placement

__all__ = ["count_messages", "kept_tensors", "make_stage"]


def make_stage(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    units: Sequence[Unit],
    routes: Sequence[Route],
    index: int,
) -> StagePlan:
    """The StagePlan of one stage.

    Its seconds include the compute time that its transfers take from the device, if any.
    """
    first, last = placement.boundaries[index], placement.boundaries[index + 1] - 1
    code = graph.stage_code(first, last)
    layers = profile.layers[first : last + 1]
    rank = placement.stage_ranks[index]
    device = cluster.device(placement.world_rank(rank, 0))
    seconds = [layer_seconds(layer, device) for layer in layers]
    forward_messages, backward_messages = count_messages(routes, index)
    recompute = placement.recompute[index]
    saved_bytes = _saved_bytes(graph, layers, code.inputs + code.outputs + code.batch_keys)
    return StagePlan(
        index=index,
        rank=rank,
        layers=tuple(layer.name for layer in graph.layers[first : last + 1]),
        recompute=recompute,
        code=code.code,
        inputs=code.inputs,
        outputs=code.outputs,
        batch_keys=code.batch_keys,
        units=tuple(unit.name for unit in units if index in unit.stages),
        mutated_inputs=code.mutated_inputs,
        forward_seconds=math.fsum(forward for forward, _ in seconds)
        + device.message_seconds * forward_messages,
        backward_seconds=math.fsum(backward for _, backward in seconds)
        + device.message_seconds * backward_messages,
        saved_bytes=saved_bytes,
        forward_transient_bytes=(
            max(layer.forward_transient_bytes for layer in layers)
            if recompute
            else _saving_transient(graph, layers, saved_bytes)
        ),
        recompute_transient_bytes=(
            _saving_transient(graph, layers, saved_bytes) if recompute else 0
        ),
        backward_transient_bytes=max(layer.backward_transient_bytes for layer in layers),
    )


def count_messages(routes: Sequence[Route], stage: int) -> tuple[int, int]:
    """Messages that a stage sends and receives in forward and in backward of one micro-batch."""
    counts = [0, 0]
    for route in routes:
        for direction, hops in enumerate((route.forward_hops(), route.backward_hops())):
            for source, destination in hops:
                counts[direction] += stage in (route.chain[source], route.chain[destination])
    return counts[0], counts[1]


def kept_tensors(profile: Profile, placement: Placement, index: int) -> set[str]:
    """Names that backward of a stage keeps alive besides what it saves itself."""
    layers = profile.layers[placement.boundaries[index] : placement.boundaries[index + 1]]
    return {name for layer in layers for name in layer.saved_tensors}


def _saved_bytes(
    graph: LayerGraph, layers: Sequence[LayerProfile], boundary: tuple[str, ...]
) -> int:
    """Bytes that one micro-batch keeps inside the stage, tensors between its layers once."""
    specs = graph.tensor_specs
    inner = {name for layer in layers for name in layer.saved_tensors} - set(boundary)
    return sum(layer.saved_bytes for layer in layers) + sum(
        specs[name].num_bytes for name in inner if name in specs
    )


def _saving_transient(graph: LayerGraph, layers: Sequence[LayerProfile], saved_bytes: int) -> int:
    """Peak of a forward that saves, above all that it saves.

    A layer's peak stands on what the earlier layers have kept.
    """
    specs = graph.tensor_specs
    peak = before = 0
    seen: set[str] = set()
    for layer in layers:
        peak = max(peak, before + layer.forward_transient_bytes)
        fresh = set(layer.saved_tensors) - seen
        seen |= fresh
        before += layer.saved_bytes + sum(specs[n].num_bytes for n in fresh if n in specs)
    return max(0, peak - saved_bytes)
