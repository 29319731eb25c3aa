"""The fastest of a placement's neighbours, by simulation: what one change more would have given.

Searches by family leave the winner as they found it. Here its order of compute, partition, buffers,
recomputation, layout and outermost stages are changed one at a time, and the simulator says which
change to keep. This module knows what may be changed. It does not know why a change helps.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from planner.errors import UsageError
from planner.explain.candidates import hybrid_group_sizes
from planner.explain.demands import meets
from planner.layouts import Layout
from planner.schedules import Schedule
from planner.solve import Placement, Problem, Simulated
from planner.solve.entry import Clock
from planner.solve.groups import partition_group_sizes, with_groups
from planner.solve.mesh import Ground

__all__ = ["improved"]

MAX_ROUNDS = 3
WORTH = 1 - 1e-6
"""What gains less is no change for the better."""
_SINGLE = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)
"""Of one stage per rank."""


def improved(
    problem: Problem,
    simulate: Callable[[Placement], Simulated],
    placement: Placement,
    step_seconds: float,
    clock: Clock,
) -> tuple[Placement, float]:
    """The placement with the changes that make it faster, and its simulated step.

    Every round takes the best of all single changes that fit and meet the demands, until none
    helps or the clock ends it.
    """
    ground = Ground.of(problem)
    best, tried = (placement, step_seconds), {placement}
    for _ in range(MAX_ROUNDS):
        start = best
        regrouped = _regrouped(problem, start[0])
        for changed in itertools.chain(_neighbours(start[0]), regrouped):
            other = with_groups(problem, changed)
            if other is None or other in tried or not _may_be(problem, other):
                continue
            if clock.left <= 0:
                return best
            tried.add(other)
            try:
                simulated = simulate(other)
            except UsageError:  # the schedule does not go with the placement
                continue
            mesh = ground.mesh(other.grid)
            if simulated.step_seconds < best[1] * WORTH and simulated.fits(mesh.limit_bytes):
                best = (other, simulated.step_seconds)
        if best is start:
            break
    return best


def _may_be(problem: Problem, placement: Placement) -> bool:
    """Whether it meets the demands, and does not divide what may not be."""
    divides = placement.schedule is Schedule.ZERO_BUBBLE
    may_divide = problem.graph_at(placement.micro_batch_size).divides_backward
    return (may_divide or not divides) and meets(problem.constraints, placement)


def _neighbours(placement: Placement) -> Iterator[Placement]:
    """The placement with one thing changed."""
    yield from _orders(placement)
    for flag in (False, True):
        yield replace(placement, recompute=(flag,) * placement.num_stages)
    if placement.num_replicas > 1:
        for level in (0, 1, 2, 3):
            yield replace(placement, partition=level)
        if placement.num_pipeline_ranks > 1:
            for layout in Layout:
                yield replace(placement, layout=layout)
    if placement.num_pipeline_ranks == 1:
        count = placement.num_stages
        outermost = {stage for stage in (0, 1, count - 3, count - 2) if 0 <= stage < count - 1}
        yield from (_merged(placement, stage) for stage in sorted(outermost))
    per_rank = -(-placement.num_stages // placement.num_pipeline_ranks)
    for number in sorted({1, 2, 3, per_rank}):
        if number <= per_rank:
            yield replace(placement, num_weight_buffers=number, num_gradient_buffers=number)


def _regrouped(problem: Problem, placement: Placement) -> Iterator[Placement]:
    """With the state divided among other replicas."""
    for size in partition_group_sizes(problem, placement.grid) if placement.partition else ():
        yield replace(placement, partition_group_size=size)


def _merged(placement: Placement, stage: int) -> Placement:
    """A stage and the next one as one: what begins or ends the step is best short, or best long."""
    cuts, flags, after = placement.boundaries, placement.recompute, stage + 1
    return replace(
        placement,
        boundaries=(*cuts[:after], *cuts[after + 1 :]),
        stage_ranks=placement.stage_ranks[1:],
        recompute=(*flags[:after], *flags[after + 1 :]),
        num_weight_buffers=min(placement.num_weight_buffers, placement.num_stages - 1),
        num_gradient_buffers=min(placement.num_gradient_buffers, placement.num_stages - 1),
    )


def _orders(placement: Placement) -> Iterator[Placement]:
    """Under other schedules. Those that alternate leave stored inputs on the device."""
    ranks, count = placement.num_pipeline_ranks, placement.num_micro_batches
    loops = placement.num_stages / ranks
    yield replace(placement, schedule=Schedule.LAYERED, group_size=0)
    if placement.offload_state or placement.offload_inputs or not placement.is_modular:
        return
    if ranks == 1:
        yield replace(placement, schedule=Schedule.PLAIN, group_size=0)
    elif loops == 1:
        for schedule in _SINGLE:
            yield replace(placement, schedule=schedule, group_size=0)
    else:
        if count % ranks == 0:
            yield replace(placement, schedule=Schedule.INTERLEAVED, group_size=0)
        for size in hybrid_group_sizes(ranks, count):
            yield replace(placement, schedule=Schedule.HYBRID, group_size=size)
