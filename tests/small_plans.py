"""Random small plans: chains with tied weights and skips on every mesh, schedule and option."""

import random
from dataclasses import replace

from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.lower import lower
from planner.partitions import updates_on_host
from planner.plan.types import Plan, PlanOptions
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["num_instructions", "small_plan"]

_LAYERED_SHARE = 0.5
_OTHERS = (
    Schedule.GPIPE,
    Schedule.ONE_F_ONE_B,
    Schedule.INTERLEAVED,
    Schedule.HYBRID,
    Schedule.ZERO_BUBBLE,
    Schedule.PLAIN,
)


def small_plan(chooser: random.Random, *, max_instructions: int = 50) -> Plan:
    """A lowered plan without a prediction, of up to five stages, three ranks and micro-batches."""
    while True:
        placement = _placement(chooser)
        graph = _graph(chooser, placement)
        profile = chain_profile(
            graph,
            saved_bytes=chooser.choice((0, 4, 12)),
            transient_bytes=chooser.choice((0, 8, 24)),
        )
        check_finite, clips = chooser.random() < 0.3, chooser.random() < 0.4
        state = {"offload_state": placement.offload_state}
        can_update_on_host = updates_on_host(placement.partition, **state)
        options = PlanOptions(
            check_finite=check_finite,
            clip_norm=1.0 if clips else None,
            clip_delayed=clips and not check_finite and chooser.random() < 0.5,
            save=chooser.random() < 0.3,
            update_on_host=can_update_on_host and chooser.random() < 0.5,
        )
        cluster = chain_cluster(placement.world_size)
        try:
            plan = lower(graph, profile, cluster, placement, options)
        except UsageError:
            continue
        if num_instructions(plan) <= max_instructions:
            return plan


def num_instructions(plan: Plan) -> int:
    """Of the training programs of all ranks."""
    return sum(map(len, plan.programs))


def _placement(chooser: random.Random) -> Placement:
    num_ranks = chooser.choice((1, 2, 2, 3))
    schedule = Schedule.LAYERED if chooser.random() < _LAYERED_SHARE else chooser.choice(_OTHERS)
    one_stage = schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)
    num_stages = num_ranks if one_stage else chooser.randint(num_ranks, 5)
    num_micro_batches = chooser.randint(1, 3)
    num_replicas, partition_group_size = chooser.choice((1, 1, 2)), 0
    if num_replicas > 1 and num_micro_batches == 2:
        num_replicas, partition_group_size = 4, 2
    placement = chain_placement(
        num_stages,
        num_ranks,
        num_micro_batches,
        num_replicas=num_replicas,
        partition=chooser.choice((0, 1, 2, 3)) if num_replicas > 1 else 0,
        num_weight_buffers=chooser.randint(1, 3),
        num_gradient_buffers=chooser.randint(1, 3),
        partition_group_size=partition_group_size,
    )
    boundaries = [0]
    for _ in range(num_stages):
        boundaries.append(boundaries[-1] + chooser.choice((1, 1, 2)))
    return replace(
        placement,
        boundaries=tuple(boundaries),
        stage_ranks=_stage_ranks(chooser, placement, schedule),
        recompute=tuple(chooser.random() < 0.3 for _ in range(num_stages)),
        schedule=schedule,
        group_size=chooser.randint(num_ranks, max(num_ranks, num_micro_batches)),
        offload_state=chooser.random() < 0.3,
        offload_inputs=chooser.random() < 0.3,
    )


def _stage_ranks(
    chooser: random.Random, placement: Placement, schedule: Schedule
) -> tuple[int, ...]:
    """Sometimes anywhere, where the schedule permits it; no rank is idle."""
    if schedule not in (Schedule.LAYERED, Schedule.PLAIN) or chooser.random() < 0.5:
        return placement.stage_ranks
    ranks = range(placement.num_pipeline_ranks)
    found = [*ranks, *chooser.choices(ranks, k=placement.num_stages - len(ranks))]
    chooser.shuffle(found)
    return tuple(found)


def _graph(chooser: random.Random, placement: Placement) -> LayerGraph:
    num_layers = placement.boundaries[-1]
    pairs = [(one, two) for one in range(num_layers) for two in range(one + 1, num_layers)]
    far = [(one, two) for one, two in pairs if two - one > 1]
    graph = chain_graph(
        num_layers,
        width=chooser.choice((1, 3)),
        num_elements=chooser.choice((1, 3)),
        tied=tuple(chooser.sample(pairs, min(len(pairs), chooser.choice((0, 0, 1))))),
        skips=tuple(chooser.sample(far, min(len(far), chooser.choice((0, 0, 1, 2))))),
    )
    frozen = chooser.random() < 0.15
    parameters = (
        replace(graph.parameters[0], trainable=not frozen),
        *graph.parameters[1:],
    )
    return replace(graph, parameters=parameters)
