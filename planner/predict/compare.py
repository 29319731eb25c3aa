"""Many configurations of one number of devices, from the fastest that fits to what does not fit.

This module knows factors and order. It does not know how a step is predicted.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from planner.predict.types import ONE_STAGE, Configuration, Predicted
from planner.schedules import Schedule
from planner.solve.choices import divisors

__all__ = ["configurations", "ranked"]

_MAX_LOOPS = 4
"""Stages per rank where none are named: more shorten the bubble little."""


def configurations(
    num_devices: int,
    *,
    devices_per_host: int,
    num_layers: int,
    replicas: Sequence[int] | None = None,
    pipeline_ranks: Sequence[int] | None = None,
    tensor_degrees: Sequence[int] | None = None,
    stages_per_rank: Sequence[int] | None = None,
    micro_batch_sizes: Sequence[int] = (1,),
    num_micro_batches: Sequence[int] | None = None,
    global_batch_size: int | None = None,
    schedules: Sequence[Schedule] = (Schedule.LAYERED,),
    recompute: Sequence[bool] = (False,),
    partitions: Sequence[int] = (0,),
) -> Iterator[Configuration]:
    """Every combination of the values that uses all devices; None stands for all that can be.

    Tensor degrees divide `devices_per_host`, and there are no more stages than layers. With
    `global_batch_size` (samples per step over all replicas) the number of micro-batches follows
    where none is named, and combinations of another batch are left out. A state is partitioned
    where there are two replicas. Where no number of stages per rank is named, schedules that can
    have several get up to four.
    """
    for tensor in tensor_degrees or divisors(devices_per_host):
        rest, left = divmod(num_devices, tensor)
        if left:
            continue
        for ranks in pipeline_ranks or divisors(rest):
            copies, left = divmod(rest, ranks)
            if left or (replicas is not None and copies not in replicas):
                continue
            for size, schedule, again, partition in itertools.product(
                micro_batch_sizes, schedules, recompute, partitions
            ):
                if partition and copies == 1 and 0 in partitions:
                    continue
                loops = _loops(stages_per_rank, schedule, num_layers // ranks)
                counts = _counts(num_micro_batches, global_batch_size, copies * size)
                for stages, count in itertools.product(loops, counts):
                    yield Configuration(
                        num_replicas=copies,
                        num_pipeline_ranks=ranks,
                        tensor_degree=tensor,
                        stages_per_rank=stages,
                        micro_batch_size=size,
                        num_micro_batches=count,
                        schedule=schedule,
                        recompute=again,
                        partition=partition,
                    )


def ranked(predictions: Iterable[Predicted]) -> list[Predicted]:
    """Those that fit, the fastest first; then those that do not, the least missing first."""
    return sorted(predictions, key=lambda found: (found.missing_bytes, found.step_seconds))


def _loops(wanted: Sequence[int] | None, schedule: Schedule, most: int) -> list[int]:
    """Stages per rank."""
    if wanted is None:
        several = schedule in (Schedule.LAYERED, Schedule.INTERLEAVED, Schedule.HYBRID)
        return [min(most, _MAX_LOOPS if several else 1)] if most else []
    return [n for n in wanted if n <= most and (n == 1 or schedule not in ONE_STAGE)]


def _counts(
    wanted: Sequence[int] | None, global_batch_size: int | None, samples: int
) -> Iterable[int]:
    """Micro-batches per replica, of which each step takes `samples` of all replicas at once."""
    if global_batch_size is None:
        return wanted or (1,)
    count, left = divmod(global_batch_size, samples)
    if left or not count or (wanted is not None and count not in wanted):
        return ()
    return (count,)
