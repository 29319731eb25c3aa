"""From a Placement to a Plan, by small passes: units, stages, routes, then each rank's program.

A program is the rank's compute steps in layered order, with the other passes' instructions placed
before or after them. Nothing here decides: every choice was the solver's or is a rule of a pass.
"""

from collections.abc import Sequence
from dataclasses import replace

from planner.cluster.types import Cluster
from planner.graph import LayerGraph
from planner.lower.compute import StageContext, compute_instruction, load_instruction
from planner.lower.data import (
    Placed,
    Span,
    gather_instructions,
    gradient_buffers,
    spans_of,
    update_instructions,
)
from planner.lower.routes import Route, make_routes
from planner.lower.stages import kept_tensors, make_stage
from planner.lower.transfers import transfer_instructions
from planner.lower.units import make_units
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions, StagePlan, Unit
from planner.profile import Profile
from planner.schedule import ComputeStep, layered_order
from planner.solve.types import Placement

__all__ = ["lower"]


def lower(
    graph: LayerGraph,
    profile: Profile,
    cluster: Cluster,
    placement: Placement,
    options: PlanOptions,
) -> Plan:
    """The plan of a placement, its prediction still open.

    With one replica there is nothing to partition, so partition 3 means 0.
    """
    if placement.num_replicas == 1 and placement.partition:
        placement = replace(placement, partition=0)
    units = make_units(graph, placement)
    routes = make_routes(graph, placement)
    stages = tuple(
        make_stage(graph, profile, cluster, placement, units, routes, index)
        for index in range(placement.num_stages)
    )
    order = layered_order(placement)
    transfers = transfer_instructions(order, routes, placement.num_micro_batches)
    programs = tuple(
        _program(profile, placement, stages, units, routes, order.ranks[rank], transfers[rank])
        for rank in range(placement.num_pipeline_ranks)
    )
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
        layer_names=tuple(layer.name for layer in graph.layers),
        batch=graph.batch,
        tensors=tuple(specs[route.tensor] for route in routes),
        parameters=graph.parameters,
        units=units,
        stages=stages,
        num_random_operators=graph.num_random_operators,
        options=options,
        prediction=None,
        programs=programs,
    )


def _program(
    profile: Profile,
    placement: Placement,
    stages: Sequence[StagePlan],
    units: Sequence[Unit],
    routes: Sequence[Route],
    steps: tuple[ComputeStep, ...],
    transfers: list[Placed],
) -> tuple[Instruction, ...]:
    """The program of one rank."""
    mine = sorted({step.stage for step in steps})
    my_units = [unit for unit in units if set(unit.stages) & set(mine)]
    sums = gradient_buffers(steps, my_units, placement)
    placed = list(transfers)
    spans: list[Span] = []
    if placement.partition:
        spans = spans_of(steps, my_units)
        placed += gather_instructions(spans, placement.num_weight_buffers)
    contexts = {
        stage: _context(profile, placement, stages[stage], my_units, routes, sums, spans, steps)
        for stage in mine
    }
    loaded: set[str] = set()
    for index, step in enumerate(steps):
        load = load_instruction(contexts[step.stage], step.micro_batch, loaded)
        if load is not None:
            placed.append(Placed(step=index, after=False, instruction=load))
        compute = compute_instruction(contexts[step.stage], step)
        placed.append(Placed(step=index, after=False, instruction=compute))
    # Stable: at one place, what was added first comes first; compute follows its own LOAD.
    sends = [p for p in placed if p.instruction.opcode is Opcode.SEND]
    others = [p for p in placed if p.instruction.opcode is not Opcode.SEND]
    placed = others + sends + update_instructions(steps, my_units, sums, placement)
    placed.sort(key=lambda p: (p.step, p.after))
    return tuple(p.instruction for p in placed)


def _context(
    profile: Profile,
    placement: Placement,
    stage: StagePlan,
    units: Sequence[Unit],
    routes: Sequence[Route],
    sums: dict[str, str],
    spans: Sequence[Span],
    steps: Sequence[ComputeStep],
) -> StageContext:
    kept = kept_tensors(profile, placement, stage.index)
    names = (*stage.inputs, *stage.outputs, *stage.batch_keys)
    used = tuple(unit for unit in units if stage.index in unit.stages)
    return StageContext(
        stage=stage,
        units=used,
        routes={route.tensor: route for route in routes if stage.index in route.chain},
        kept_tensors=tuple(name for name in names if name in kept and name != "loss"),
        weight_buffers={unit.name: _weight_buffers(unit, stage, spans, steps) for unit in used},
        neighbours=tuple(sorted({step.stage for step in steps})),
        gradient_buffers=sums,
    )


def _weight_buffers(
    unit: Unit, stage: StagePlan, spans: Sequence[Span], steps: Sequence[ComputeStep]
) -> tuple[str, str]:
    """Buffers of a unit while a stage runs forward and backward."""
    if not spans:
        return f"weights:{unit.name}", f"weights:{unit.name}"
    forward = next(
        i for i, s in enumerate(steps) if s.stage == stage.index and s.opcode is Opcode.FORWARD
    )
    backward = next(
        i for i, s in enumerate(steps) if s.stage == stage.index and s.opcode is not Opcode.FORWARD
    )
    return _buffer_at(unit, spans, forward), _buffer_at(unit, spans, backward)


def _buffer_at(unit: Unit, spans: Sequence[Span], step: int) -> str:
    return next(s.buffer for s in spans if s.unit is unit and s.first <= step <= s.last)
