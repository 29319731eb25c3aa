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

from collections.abc import Iterable

import numpy as np

from planner.partitions import gathers_updates
from planner.solve.floor_memory import Surroundings, gathers, least_rebuilt
from planner.solve.floor_ranks import Waits, fullest_seconds
from planner.solve.rates import Floats, LayerFloors
from planner.solve.space import Batching, Options

__all__ = ["least_seconds", "quick_seconds", "rough_seconds", "traffic_seconds"]


def rough_seconds(batching: Batching, floors: LayerFloors) -> float:
    """Compute alone, at next to no cost."""
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    before, after = _waits(floors, ranks)
    return float(count * floors.prefix[-1] / ranks + before.mean() + after.mean())


def quick_seconds(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    grouped: Iterable[Surroundings],
) -> float:
    """The same for any options: the memory of the roomiest, the quickest update and traffic.

    `grouped` has an entry for each size of groups that may partition a state.
    """
    # Weights that all replicas hold whole come from the host where the state is offloaded.
    plans = [(around, 0, False), (around, 0, True)]
    plans += [(one, partition, True) for one in grouped for partition in (1, 3)]
    return min(
        least_seconds(
            batching,
            floors,
            one,
            Options(partition=partition, offload_state=away, offload_inputs=True),
        )
        for one, partition, away in plans
    )


def least_seconds(
    batching: Batching, floors: LayerFloors, around: Surroundings, options: Options
) -> float:
    """A step time that no placement with these options undercuts; infinite where none fits."""
    if not gathers(options):
        return _least_time(batching, floors, around, options, 0)
    return min(_least_time(batching, floors, around, options, number) for number in (1, 2))


def _least_time(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    num_buffers: int,
) -> float:
    """With one buffer for weights, or two or more; 0 where none are gathered."""
    partition = options.partition
    ranks, count = batching.num_pipeline_ranks, batching.num_micro_batches
    rebuilt = least_rebuilt(batching, floors, around, options, num_buffers)
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
    shards = around.num_parts if partition else 1
    updates = around.trainable_bytes * around.update_seconds / shards
    start, end, whole = traffic_seconds(batching, around, partition)
    last = end
    if around.trainable_bytes[0]:
        last += max(float(updates[0]), around.least_update_seconds)

    # The mean rank: its compute, its waits, the first gather, the last reduction and update.
    mean = start + shown + last
    moved = _moved_seconds(batching, floors, around, options)
    mean = max(mean, min((compute + rebuilt) / ranks + moved[0], moved[1]))
    # Its updates take compute time too, but may fill the wait at its end.
    backs = np.concatenate([[0.0], np.cumsum(floors.backward)])[:ranks]
    computed = float(updates.sum()) * around.updates_compute
    updated = start + shown + computed / ranks - float(backs.mean())
    # Of so many long layers some rank has its share, rounded up.
    shares = -(-np.arange(1, len(floors.falling) + 1) // ranks)
    least_wait = float((before + after).min())
    crowded = start + count * float((shares * floors.falling).max()) + least_wait + last
    # One micro-batch goes through all layers, and the longest layer runs all the others.
    longest = float(floors.forward.max() + floors.backward.max())
    chain = start + float(floors.prefix[-1]) + (count - 1) * longest + last
    waits = Waits(start=start, last=last, before=before, between=after)
    return max(
        mean,
        updated,
        crowded,
        chain,
        _coming(batching, floors, around, options, rebuilt) if num_buffers == 1 else 0.0,
        _after_forward(batching, floors, whole, start),
        fullest_seconds(batching, floors, around, options, waits, num_buffers),
    )


def _coming(
    batching: Batching,
    floors: LayerFloors,
    around: Surroundings,
    options: Options,
    rebuilt: float,
) -> float:
    """With one buffer for weights, none come while the stage before is computed."""
    each = around.byte_seconds if options.partition == 3 else around.load_byte_seconds
    coming = float((around.weight_bytes - around.tied_bytes).sum()) * each
    compute = batching.num_micro_batches * float(floors.prefix[-1]) + rebuilt
    return (compute + coming) / batching.num_pipeline_ranks


def _waits(floors: LayerFloors, ranks: int) -> tuple[Floats, Floats]:
    """Per rank: seconds of the layers before its own, which it waits for at both ends of the step,
    and of those after its own, which it waits for in between."""
    prefix = floors.prefix
    return prefix[:ranks], prefix[-1] - prefix[len(prefix) - ranks :]


def traffic_seconds(
    batching: Batching, around: Surroundings, partition: int
) -> tuple[float, float, float]:
    """Seconds before the first forward, after the last backward, and of a rank's reductions."""
    weights, trained = float(around.weight_bytes[0]), float(around.trainable_bytes[0])
    passes, each = (1 if partition == 3 else 2), around.pass_seconds
    start = weights * around.byte_seconds + each if partition == 3 and weights else 0.0
    again = _second_pass_bytes(around, partition)
    moved = trained + float(again[0])
    end = moved * around.byte_seconds + passes * each if trained else 0.0
    whole = float((around.trainable_bytes + again).sum()) * around.byte_seconds
    return start, end, whole / batching.num_pipeline_ranks


def _second_pass_bytes(around: Surroundings, partition: int) -> Floats:
    """Bytes per layer that pass between replicas once its gradients have been summed in parts."""
    if partition == 3:
        return np.zeros_like(around.trainable_bytes)
    return around.updated_bytes if gathers_updates(partition) else around.trainable_bytes


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
    trained = around.trainable_bytes + _second_pass_bytes(around, options.partition)
    light = ~heavy
    light[np.flatnonzero(heavy)[-1] :] = False
    ahead = count * float(floors.forward[light].sum())
    behind = ahead + count * float(floors.backward[light].sum())
    each = around.byte_seconds if options.partition == 3 else around.load_byte_seconds
    gather = least * each if gathers(options) else 0.0
    reduction = float(trained[heavy].min()) * around.byte_seconds
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
