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

from dataclasses import dataclass

import numpy as np

from planner.solve.rates import Floats, LayerFloors
from planner.solve.space import Batching, Options

__all__ = ["Surroundings", "least_seconds", "quick_seconds", "rough_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a mesh offers, and what the model's parameters ask of it."""

    limit_bytes: Floats
    """Per pipeline rank."""
    weight_bytes: Floats
    """Per layer, tied ones once; as the following."""
    trainable_bytes: Floats
    optimizer_slots: int
    byte_seconds: float
    """Of a byte of weights to pass between all replicas once; 0 with one."""
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
    partitions = (1, 3) if batching.num_replicas > 1 else (0,)
    roomiest = Options(partition=partitions[-1], offload_state=True, offload_inputs=True)
    rebuilt = _least_rebuilt(batching, floors, around, roomiest)
    return min(_least_time(batching, floors, around, one, rebuilt) for one in partitions)


def least_seconds(
    batching: Batching, floors: LayerFloors, around: Surroundings, options: Options
) -> float:
    """A step time that no placement with these options undercuts; infinite where none fits."""
    rebuilt = _least_rebuilt(batching, floors, around, options)
    return _least_time(batching, floors, around, options.partition, rebuilt)


def _least_time(
    batching: Batching, floors: LayerFloors, around: Surroundings, partition: int, rebuilt: float
) -> float:
    """With so many seconds of recompute, all ranks together."""
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


def _after_forward(
    batching: Batching, floors: LayerFloors, whole_seconds: float, start_seconds: float
) -> float:
    """No gradient is complete before a rank has done all its forwards and a layer's backwards."""
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    forward = count * float(floors.forward.sum()) / ranks
    return start_seconds + forward + count * float(floors.backward.min()) + whole_seconds


def _least_rebuilt(
    batching: Batching, floors: LayerFloors, around: Surroundings, options: Options
) -> float:
    """Seconds of forwards that memory forces all ranks together to run again; infinite where even
    recompute does not help."""
    count, ranks = batching.num_micro_batches, batching.num_pipeline_ranks
    state = _state_bytes(batching, around, options)
    pools = _pool_bytes(around, options)
    alone = state + pools + floors.saved
    if float(alone.max()) > float(around.limit_bytes.max()):
        return float("inf")
    smallest = np.sort(pools)[: ranks - 1]
    room = float(around.limit_bytes.sum()) - float(state.sum())
    room -= float(pools.max()) + float(smallest.sum()) + float(floors.ending[0])
    if room < 0:
        return float("inf")
    kept = count * (floors.saved + (0.0 if options.offload_inputs else floors.named))
    missing = float(kept.sum()) - room
    if around.recompute or missing <= 0:
        return count * float(floors.forward.sum()) if around.recompute else 0.0
    if around.recompute is False:
        return float("inf")
    return count * _least_cost(kept, floors.forward, missing)


def _least_cost(sizes: Floats, costs: Floats, missing: float) -> float:
    """The least sum of costs of parts of items whose sizes add up to what is missing."""
    order = np.argsort(costs / np.maximum(sizes, 1e-9))
    spared, spent = np.cumsum(sizes[order]), np.cumsum(costs[order])
    last = int(np.searchsorted(spared, missing))
    if last == len(order):
        return float(spent[-1])
    over = (spared[last] - missing) / max(sizes[order[last]], 1e-9)
    return float(spent[last] - over * costs[order[last]])


def _state_bytes(batching: Batching, around: Surroundings, options: Options) -> Floats:
    """Per layer: weights and moments that stand on a device through forward."""
    if options.offload_state:
        return np.zeros_like(around.weight_bytes)
    replicas = batching.num_replicas
    moments = around.optimizer_slots * around.trainable_bytes
    weights = around.weight_bytes / (replicas if options.partition == 3 else 1)
    state: Floats = weights + moments / (replicas if options.partition else 1)
    return state


def _pool_bytes(around: Surroundings, options: Options) -> Floats:
    """Per layer: the least buffers of a rank that holds it."""
    gathers = options.partition == 3 or options.offload_state
    pools: Floats = around.trainable_bytes + (around.weight_bytes if gathers else 0.0)
    return pools
