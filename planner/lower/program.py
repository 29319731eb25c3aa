"""From a Placement to a Plan, by small passes: units, stages, routes, then each rank's program.

A program is the rank's compute steps in the order of its schedule, with the other passes'
instructions placed before or behind them. Nothing here decides: every choice was the solver's or is
a rule of a pass.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.cluster.types import Cluster
from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.lower.buffers import BufferTable
from planner.lower.compute import Template, compute_instructions, place_loads, stage_templates
from planner.lower.gradients import accumulate, gradient_pools, place_reductions, sources
from planner.lower.offload import place_offload
from planner.lower.pools import Holding, Pools
from planner.lower.routes import Route, make_routes
from planner.lower.slots import LOOKAHEAD, BufferNames, Slots
from planner.lower.stages import StageMaker
from planner.lower.transfers import place_transfers
from planner.lower.units import make_units, units_by_stage
from planner.lower.updates import place_updates
from planner.lower.weights import (
    hold_weights,
    place_fetched_gathers,
    place_gathers,
    weights_in_place,
)
from planner.lower.work import RankWork
from planner.partitions import gathers_for_passes, updates_on_host
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions, StagePlan, Unit
from planner.profile import Profile
from planner.schedule import Order, forward_order, order_of, require_complete
from planner.schedules import Schedule
from planner.solve.types import Placement
from planner.words import counted

__all__ = ["lower"]


def lower(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    options: PlanOptions,
    order: Order | None = None,
) -> Plan:
    """The plan of a placement, its prediction still open.

    With one replica, or groups of one, there is nothing to partition, so any partition means 0.
    Stages may be on any ranks. An `order` of one's own takes the place of the schedule's, and the
    plan's schedule is then `custom`.

    Raises:
        UsageError: the schedule does not go with the placement, the order lacks a step, a rank has
            no stage, the replicas do not divide into partition groups, or updates are on the host
            and the state is not.
    """
    placement, order = _settled(placement, order)
    _require_state_on_host(placement, options)
    context = _context(graph, profile, cluster, placement, options)
    programs, evaluation, pools = _all_programs(context, order)
    table = BufferTable(graph, placement, options, context.stages, context.units)
    specs = graph.tensor_specs
    return Plan(
        model_name=graph.model_name,
        fingerprint=graph.fingerprint,
        cluster=cluster,
        num_replicas=placement.num_replicas,
        num_pipeline_ranks=placement.num_pipeline_ranks,
        micro_batch_size=placement.micro_batch_size,
        num_micro_batches=placement.num_micro_batches,
        partition=placement.partition,
        offload_state=placement.offload_state,
        schedule=placement.schedule,
        layer_names=tuple(layer.name for layer in graph.layers),
        batch=graph.batch,
        tensors=tuple(specs[route.tensor] for route in context.routes),
        parameters=graph.parameters,
        units=context.units,
        stages=context.stages,
        num_random_operators=graph.num_random_operators,
        options=options,
        prediction=None,
        programs=programs,
        evaluation=evaluation,
        buffers=tuple(
            table.of_rank((programs[rank], *evaluation[rank : rank + 1]), pools[rank])
            for rank in range(placement.num_pipeline_ranks)
        ),
        module_buffer_bytes=graph.buffer_bytes + _kept_buffer_bytes(profile, placement),
        layout=placement.layout,
        partition_group_size=placement.partition_group_size,
    )


def _settled(placement: Placement, order: Order | None) -> tuple[Placement, Order]:
    """The placement as it is run, and the order of its compute steps."""
    _require_stages(placement)
    placement = _settled_partition(placement)
    if order is None:
        return placement, order_of(placement)
    require_complete(order, placement)
    return replace(placement, schedule=Schedule.CUSTOM), order


def _settled_partition(placement: Placement) -> Placement:
    """Of what says the same, the plainest: no partition of one part, no group that is all."""
    size, replicas = placement.partition_group_size, placement.num_replicas
    if size < 0 or (size and replicas % size):
        raise UsageError(
            f"{counted(replicas, 'replica')} do not divide into partition groups of {size}",
            hint=f"groups of a divisor of {replicas}, or another number of replicas",
        )
    if placement.num_parts == 1:
        return replace(placement, partition=0, partition_group_size=0)
    return replace(placement, partition_group_size=size if size < replicas else 0)


def _require_stages(placement: Placement) -> None:
    """Refuse a placement with idle ranks, or with a stage on a rank that it does not have."""
    ranks, used = set(range(placement.num_pipeline_ranks)), set(placement.stage_ranks)
    for rank in sorted(ranks ^ used):
        problem = "has no stage" if rank in ranks else "has a stage, but is none of them"
        raise UsageError(
            f"pipeline rank {rank} of {placement.num_pipeline_ranks} {problem}: the stages are on "
            f"ranks {', '.join(map(str, placement.stage_ranks))}",
            hint="give every pipeline rank a stage, or take fewer pipeline ranks",
        )


def _require_state_on_host(placement: Placement, options: PlanOptions) -> None:
    """Refuse updates on the host of a state that is not all there."""
    partition, is_away = placement.partition, placement.offload_state
    if not options.update_on_host or updates_on_host(partition, offload_state=is_away):
        return
    found = f"of partition {partition} keeps its weights on the device"
    if not is_away:
        found = "does not offload the state"
    raise UsageError(
        f"updates on the host need shards and optimizer state there, but the placement {found}",
        hint="offload the state with partition 0 or 3, or update on the device",
    )


def _kept_buffer_bytes(profile: Profile, placement: Placement) -> int:
    """Copies of buffers that a forward changes, until the micro-batch's recompute reads them: of
    all micro-batches, on the rank that has most."""
    found: Counter[int] = Counter()
    for stage, (first, end) in enumerate(itertools.pairwise(placement.boundaries)):
        if placement.recompute[stage]:
            found[placement.stage_ranks[stage]] += sum(
                layer.memory.changed_buffer_bytes
                for layer in profile.layers[first:end]
                if layer.memory
            )
    return placement.num_micro_batches * max(found.values(), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What the programs of all ranks have in common."""

    placement: Placement
    options: PlanOptions
    units: tuple[Unit, ...]
    units_of: Sequence[Sequence[Unit]]
    """By stage."""
    routes: tuple[Route, ...]
    stages: tuple[StagePlan, ...]
    names: BufferNames


def _context(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    options: PlanOptions,
) -> _Context:
    firsts, ends = placement.boundaries[:-1], placement.boundaries[1:]
    codes = [graph.stage_code(first, end - 1) for first, end in zip(firsts, ends, strict=True)]
    units = make_units(graph, placement, options, codes)
    units_of = units_by_stage(units, placement.num_stages)
    routes = make_routes(graph, placement)
    maker = StageMaker(graph, profile, cluster, placement, routes)
    return _Context(
        placement=placement,
        options=options,
        units=units,
        units_of=units_of,
        routes=routes,
        stages=tuple(maker.stage(index, code, units_of[index]) for index, code in enumerate(codes)),
        names=BufferNames(placement.num_micro_batches),
    )


_Programs = tuple[tuple[Instruction, ...], ...]
"""Of every rank."""


def _all_programs(
    context: _Context, order: Order
) -> tuple[_Programs, _Programs, list[dict[str, Unit]]]:
    """Of the step and, where it trains, of an evaluation; and the unit of each pool buffer."""
    is_training = context.placement.schedule is not Schedule.FORWARD
    programs, pools = _programs(context, order, is_training=is_training)
    if not is_training:
        return programs, (), pools
    forward = forward_order(context.placement)
    evaluation, more = _programs(context, forward, is_training=False)
    return programs, evaluation, [_larger(*pair) for pair in zip(pools, more, strict=True)]


def _programs(
    context: _Context, order: Order, *, is_training: bool
) -> tuple[_Programs, list[dict[str, Unit]]]:
    """The program of every rank, and the unit that each buffer of its pools must hold."""
    routes = {route.tensor: route for route in context.routes}
    templates = [
        stage_templates(stage, routes, context.names, saves=is_training) for stage in context.stages
    ]
    slots = [Slots(len(steps)) for steps in order.ranks]
    sent = place_transfers(slots, order, context.routes, context.names)
    programs, pools = [], []
    for rank, steps in enumerate(order.ranks):
        work = RankWork.of(steps, context.units_of)
        program, largest = _program(context, work, templates, slots[rank], sent[rank], is_training)
        programs.append(program)
        pools.append(largest)
    return tuple(programs), pools


def _program(
    context: _Context,
    work: RankWork,
    templates: Sequence[Mapping[Opcode, Template]],
    slots: Slots,
    sent: set[str],
    is_training: bool,
) -> tuple[tuple[Instruction, ...], dict[str, Unit]]:
    """One rank's program. At one place, what an earlier pass put comes first."""
    placement, options = context.placement, context.options
    holdings: list[Holding] | None = None
    weight_pools = Pools("weights", placement.num_weight_buffers)
    if gathers_for_passes(placement.partition, offload_state=placement.offload_state):
        weights, holdings = hold_weights(work, weight_pools), weight_pools.holdings
        if placement.offload_state:
            num_ahead = max(LOOKAHEAD, placement.num_micro_batches)
            place_fetched_gathers(slots, holdings, num_ahead)
        else:
            place_gathers(slots, holdings)
    else:
        weights = weights_in_place(work)
    sum_pools = gradient_pools(work, placement, options)
    sums = accumulate(work, sum_pools, context.names)
    compute = compute_instructions(work, templates, weights, sums)
    if placement.offload_inputs:
        place_offload(slots, compute, sent)
    place_loads(slots, work, context.stages, context.names)
    if is_training:
        place_reductions(slots, sum_pools.holdings, placement)
        found = sources(work, sum_pools, placement)
        place_updates(slots, work, found, holdings, placement, options)
    return slots.program(compute), {**weight_pools.largest(), **sum_pools.largest()}


def _larger(one: Mapping[str, Unit], other: Mapping[str, Unit]) -> dict[str, Unit]:
    """The larger unit of each buffer."""
    found = dict(one)
    for buffer, unit in other.items():
        if buffer not in found or found[buffer].num_elements < unit.num_elements:
            found[buffer] = unit
    return found
