"""What memory costs at least, whatever the split: recompute that all ranks together need.

What backward needs of all micro-batches stands on the ranks at the end of forward, beside their
state and their buffers; what does not fit is run forward again.
This module knows layers, bytes and limits. It does not know how a step passes.
"""

import math
from dataclasses import dataclass

import numpy as np

from planner.partitions import gathers_for_passes, offloaded
from planner.solve.rates import Floats, LayerFloors
from planner.solve.space import Batching, Options

__all__ = [
    "Surroundings",
    "gathers",
    "least_cost",
    "least_rebuilt",
    "pool_bytes",
    "several_pool_bytes",
    "state_bytes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a mesh offers, and what the model's parameters ask of it."""

    limit_bytes: Floats
    """Per pipeline rank."""
    weight_bytes: Floats
    """Per layer, tied ones once; as the following."""
    trainable_bytes: Floats
    tied_bytes: Floats
    """Of those weights that other layers use too: they have buffers of their own."""
    shard_bytes: Floats
    """Of what is kept of the weights: the same, but for the masters of mixed precision."""
    master_bytes: Floats
    """Of those masters alone, which stand beside weights in place."""
    updated_bytes: Floats
    """Of the weights that are trained, as the others gather them."""
    optimizer_slots: int
    num_parts: int
    """Replicas that divide a state where it is partitioned."""
    byte_seconds: float
    """Of a byte of weights to pass between those once; 0 with one."""
    load_byte_seconds: float
    """Of a byte from host memory."""
    pass_seconds: float
    """Latency of passing anything between those once; 0 with one."""
    least_update_seconds: float
    update_seconds: float
    """Of a byte of trainable parameters, whole."""
    recompute: bool | None
    """What the user demands of all stages."""
    updates_compute: bool = True
    """Whether updates take the time of compute, and not the host's."""


def least_rebuilt(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    num_buffers: int,
) -> float:
    """Seconds of forwards that memory forces all ranks together to run again; infinite where even
    recompute does not help. With two buffers or more, weights are gathered."""
    count, ranks = batching.num_micro_batches, batching.num_pipeline_ranks
    state = state_bytes(around, options)
    pools = pool_bytes(around, options)
    alone = state + pools + floors.saved
    if float(alone.max()) > float(around.limit_bytes.max()):
        return float("inf")
    smallest = np.sort(pools)[: ranks - 1]
    room = float(around.limit_bytes.sum()) - float(state.sum())
    pooled = float(pools.max()) + float(smallest.sum())
    if num_buffers > 1:
        # A rank with one stage alone has one buffer for all of its layers.
        alone, each = several_pool_bytes(around, options)
        own = np.sort(each)
        several = float(own[-1]) + float(own[: ranks - 1].sum())
        pooled = max(pooled, min(several, float(alone.sum())))
    room -= pooled + float(floors.ending[0])
    if room < 0:
        return float("inf")
    kept = count * (floors.saved + (0.0 if options.offload_inputs else floors.named))
    # The last layer has its first micro-batch there when its backward begins, rebuilt or not.
    room -= float(floors.saved[-1])
    kept[-1] -= float(floors.saved[-1])
    missing = float(kept.sum()) - room
    if around.recompute or missing <= 0:
        return count * float(floors.again.sum()) if around.recompute else 0.0
    if around.recompute is False:
        return float("inf")
    return count * least_cost(kept, floors.again, missing)


def least_cost(sizes: Floats, costs: Floats, missing: float) -> float:
    """The least sum of costs of items whose sizes add up to what is missing.

    Items like the middle one are taken whole; of the others, parts will do.
    """
    middle = np.argsort(sizes, kind="stable")[len(sizes) // 2]
    alike = np.isclose(sizes, sizes[middle]) & np.isclose(costs, costs[middle])
    size, cost = float(sizes[alike].max()), float(costs[alike].min())
    sizes, costs = np.where(alike, size, sizes), np.where(alike, cost, costs)
    fractional, taken = _fractions(sizes, costs, missing)
    if size <= 0:
        return fractional
    # The cost is convex in the number of whole items: the best is next to the fractional one.
    number = float(taken[alike].sum())
    least = float("inf")
    for whole in {math.floor(number + 1e-9), math.ceil(number - 1e-9)}:
        left = missing - whole * size
        rest = _fractions(sizes[~alike], costs[~alike], left)[0] if left > 0 else 0.0
        least = min(least, whole * cost + rest)
    return max(fractional, least) if least < float("inf") else fractional


def _fractions(sizes: Floats, costs: Floats, missing: float) -> tuple[float, Floats]:
    """The same where parts of items will do, and the parts; infinite where all do not suffice."""
    order = np.argsort(costs / np.maximum(sizes, 1e-9), kind="stable")
    before = np.concatenate([[0.0], np.cumsum(sizes[order])])
    parts = np.zeros(len(sizes))
    parts[order] = np.clip((missing - before[:-1]) / np.maximum(sizes[order], 1e-9), 0.0, 1.0)
    total = float((parts * costs).sum())
    return (total if before[-1] >= missing else float("inf")), parts


def state_bytes(around: Surroundings, options: Options) -> Floats:
    """Per layer: weights and moments that stand on a device through forward."""
    away = offloaded(options.partition, offload_state=options.offload_state)
    moments = around.optimizer_slots * around.trainable_bytes * ("moments" not in away)
    shards = around.num_parts if options.partition else 1
    if gathers(options):
        weights = around.shard_bytes * ("shard" not in away) / shards
    else:
        weights = around.weight_bytes + around.master_bytes / shards
    state: Floats = weights + moments / shards
    return state


def pool_bytes(around: Surroundings, options: Options) -> Floats:
    """Per layer: the least buffers of a rank that holds it."""
    pools: Floats = around.trainable_bytes + (around.weight_bytes if gathers(options) else 0.0)
    return pools


def several_pool_bytes(around: Surroundings, options: Options) -> tuple[Floats, Floats]:
    """Per layer, where weights are gathered and there are two buffers or more: what it adds to the
    one buffer of a rank that has one stage alone, and the least buffers of a rank with more."""
    alone = np.maximum(pool_bytes(around, options) - 2 * around.tied_bytes, 0.0)
    doubled = around.trainable_bytes if options.partition == 3 else 0.0
    more = around.weight_bytes + doubled - 2 * around.tied_bytes
    return alone, alone + np.maximum(more, 0.0)


def gathers(options: Options) -> bool:
    return gathers_for_passes(options.partition, offload_state=options.offload_state)
