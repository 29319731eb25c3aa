"""What no placement of a mesh and batching can undercut, whatever its stages and options.

These bounds cover the whole space of the layered order: every split, any number of stages per
rank, recompute per stage, every partition, offload and pool size. A rank does its compute, and
waits besides for the first micro-batch to come down the pipeline to it, for the last stages to
turn it round, and for its way back: at least the layers before and after the rank's own, since
stages are runs of layers. Memory forces recompute: what backward needs of all micro-batches stands
on the ranks together at the end of forward, beside their state. Means over ranks make all of that
independent of the split.
This module knows layers, links and limits. It does not know splits.
"""

import math
from dataclasses import dataclass

import numpy as np

from planner.partitions import gathers_for_passes, offloaded
from planner.solve.rates import Floats, LayerFloors
from planner.solve.space import Batching, Options

__all__ = ["Surroundings", "least_cost", "least_seconds", "quick_seconds", "rough_seconds"]


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
    optimizer_slots: int
    byte_seconds: float
    """Of a byte of weights to pass between all replicas once; 0 with one."""
    load_byte_seconds: float
    """Of a byte from host memory."""
    pass_seconds: float
    """Latency of passing anything between all replicas once; 0 with one."""
    least_update_seconds: float
    update_seconds: float
    """Of a byte of trainable parameters, whole."""
    recompute: bool | None
    """What the user demands of all stages."""


def rough_seconds(batching: Batching, floors: LayerFloors) -> float:
    """Compute alone, at next to no cost."""
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    before, after = _waits(floors, ranks)
    return float(count * floors.prefix[-1] / ranks + before.mean() + after.mean())


def quick_seconds(batching: Batching, floors: LayerFloors, around: Surroundings) -> float:
    """The same for any options: the memory of the roomiest, the quickest update and traffic."""
    # Weights that all replicas hold whole come from the host where the state is offloaded.
    plans = [(0, False), (0, True)] + [(1, True), (3, True)] * (batching.num_replicas > 1)
    roomiest = (
        Options(partition=partition, offload_state=away, offload_inputs=True)
        for partition, away in plans
    )
    return min(least_seconds(batching, floors, around, options) for options in roomiest)


def least_seconds(
    batching: Batching, floors: LayerFloors, around: Surroundings, options: Options
) -> float:
    """A step time that no placement with these options undercuts; infinite where none fits."""
    partition = options.partition
    rebuilt = _least_rebuilt(batching, floors, around, options)
    found = _least_time(batching, floors, around, options, rebuilt)
    if found == float("inf") or not _gathers(options):
        return found
    # With one buffer for weights, none come while the stage before is computed.
    each = around.byte_seconds if partition == 3 else around.load_byte_seconds
    coming = (around.weight_bytes - around.tied_bytes).sum() * each
    compute = batching.num_micro_batches * floors.prefix[-1] + rebuilt
    one_buffer = max(found, float(compute + coming) / batching.num_pipeline_ranks)
    rebuilt = _least_rebuilt(batching, floors, around, options, num_buffers=2)
    return min(one_buffer, _least_time(batching, floors, around, options, rebuilt))


def _least_time(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    rebuilt: float,
) -> float:
    """With so many seconds of recompute, all ranks together."""
    partition = options.partition
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    if rebuilt == float("inf"):
        return rebuilt
    before, after = _waits(floors, ranks)
    # While a rank waits for the last stages, it may rebuild the first micro-batch of its own last
    # one: either all of that wait is hidden so, or no more than a micro-batch of recompute.
    compute = count * float(floors.prefix[-1])
    shown = max(
        (compute + rebuilt) / ranks + float(before.mean()),
        (compute + rebuilt * (count - 1) / count) / ranks + float((before + after).mean()),
    )
    shards = batching.num_replicas if partition else 1
    updates = around.trainable_bytes * around.update_seconds / shards
    start, end, whole = _traffic(batching, around, partition)
    last = end
    if around.trainable_bytes[0]:
        last += max(float(updates[0]), around.least_update_seconds)

    # The mean rank: its compute, its waits, the first gather, the last reduction and update.
    mean = start + shown + last
    moved = _moved_seconds(batching, floors, around, options)
    mean = max(mean, min((compute + rebuilt) / ranks + moved[0], moved[1]))
    # Its updates take compute time too, but may fill the wait at its end.
    backs = np.concatenate([[0.0], np.cumsum(floors.backward)])[:ranks]
    updated = start + shown + float(updates.sum()) / ranks - float(backs.mean())
    # Of so many long layers some rank has its share, rounded up.
    shares = -(-np.arange(1, len(floors.falling) + 1) // ranks)
    least_wait = float((before + after).min())
    crowded = start + count * float((shares * floors.falling).max()) + least_wait + last
    # One micro-batch goes through all layers, and the longest layer runs all the others.
    longest = float(floors.forward.max() + floors.backward.max())
    chain = start + float(floors.prefix[-1]) + (count - 1) * longest + last
    return max(mean, updated, crowded, chain, _after_forward(batching, floors, whole, start))


def _waits(floors: LayerFloors, ranks: int) -> tuple[Floats, Floats]:
    """Per rank: seconds of the layers before its own, which it waits for at both ends of the step,
    and of those after its own, which it waits for in between."""
    prefix = floors.prefix
    return prefix[:ranks], prefix[-1] - prefix[len(prefix) - ranks :]


def _traffic(
    batching: Batching, around: Surroundings, partition: int
) -> tuple[float, float, float]:
    """Seconds before the first forward, after the last backward, and of a rank's reductions."""
    weights, trained = float(around.weight_bytes[0]), float(around.trainable_bytes[0])
    passes, each = (1 if partition == 3 else 2), around.pass_seconds
    gathers = partition == 3 and weights
    start = weights * around.byte_seconds + each if gathers else 0.0
    end = passes * (trained * around.byte_seconds + each) if trained else 0.0
    whole = float(around.trainable_bytes.sum()) * around.byte_seconds
    return start, end, passes * whole / batching.num_pipeline_ranks


def _moved_seconds(
    batching: Batching, floors: LayerFloors, around: Surroundings, options: Options
) -> tuple[float, float]:
    """What every rank waits for weights and gradients of a layer with many of them, if each rank
    has such a layer; and what a step takes at least if some rank has none.

    A rank computes nothing but lighter layers before the gather of its first such layer is over,
    nor after that layer's backward, when its gradients are still to be reduced. Of all ranks' first
    such layers, one micro-batch runs through one after the other, and back.
    """
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    least = float(np.median(around.weight_bytes))
    heavy = around.weight_bytes >= least
    trained = float(around.trainable_bytes[heavy].min())
    light = ~heavy
    light[np.flatnonzero(heavy)[-1] :] = False
    ahead = count * float(floors.forward[light].sum())
    behind = ahead + count * float(floors.backward[light].sum())
    each = around.byte_seconds if options.partition == 3 else around.load_byte_seconds
    gather = least * each if _gathers(options) else 0.0
    reduction = (1 if options.partition == 3 else 2) * trained * around.byte_seconds
    without = count * float(floors.both[heavy].sum()) / (ranks - 1) if ranks > 1 else float("inf")
    # Of the ranks in the order of those layers: the layers of the ranks before come first.
    places = np.arange(ranks)
    start = gather + places * float(floors.forward[heavy].min())
    end = reduction + places * float(floors.backward[heavy].min())
    waits = np.maximum(0.0, start - ahead) + np.maximum(0.0, end - behind)
    return float(waits.mean()), without


def _after_forward(
    batching: Batching, floors: LayerFloors, whole_seconds: float, start_seconds: float
) -> float:
    """No gradient is complete before a rank has done all its forwards and a layer's backwards."""
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    forward = count * float(floors.forward.sum()) / ranks
    return start_seconds + forward + count * float(floors.backward.min()) + whole_seconds


def _least_rebuilt(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    num_buffers: int = 1,
) -> float:
    """Seconds of forwards that memory forces all ranks together to run again; infinite where even
    recompute does not help. With two buffers or more, weights are gathered."""
    count, ranks = batching.num_micro_batches, batching.num_pipeline_ranks
    state = _state_bytes(batching, around, options)
    pools = _pool_bytes(around, options)
    alone = state + pools + floors.saved
    if float(alone.max()) > float(around.limit_bytes.max()):
        return float("inf")
    smallest = np.sort(pools)[: ranks - 1]
    room = float(around.limit_bytes.sum()) - float(state.sum())
    pooled = float(pools.max()) + float(smallest.sum())
    if num_buffers > 1:
        # A rank with one stage alone has one buffer for all of its layers.
        alone = np.maximum(pools - 2 * around.tied_bytes, 0.0)
        doubled = around.trainable_bytes if options.partition == 3 else 0.0
        own = np.sort(alone + np.maximum(around.weight_bytes + doubled - 2 * around.tied_bytes, 0))
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
        return count * float(floors.forward.sum()) if around.recompute else 0.0
    if around.recompute is False:
        return float("inf")
    return count * least_cost(kept, floors.forward, missing)


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


def _state_bytes(batching: Batching, around: Surroundings, options: Options) -> Floats:
    """Per layer: weights and moments that stand on a device through forward."""
    replicas = batching.num_replicas
    away = offloaded(options.partition, offload_state=options.offload_state)
    moments = around.optimizer_slots * around.trainable_bytes * ("moments" not in away)
    weights = around.weight_bytes * ("shard" not in away)
    weights = weights / (replicas if options.partition == 3 else 1)
    state: Floats = weights + moments / (replicas if options.partition else 1)
    return state


def _pool_bytes(around: Surroundings, options: Options) -> Floats:
    """Per layer: the least buffers of a rank that holds it."""
    pools: Floats = around.trainable_bytes + (around.weight_bytes if _gathers(options) else 0.0)
    return pools


def _gathers(options: Options) -> bool:
    return gathers_for_passes(options.partition, offload_state=options.offload_state)
