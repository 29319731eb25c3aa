"""From a lowered plan to the scheduling problem of its compute, and orders there and back.

Durations are rounded down, transfers go at their links' full rate and never wait for one another,
and memory counts only what is surely held: so no order of the placement is faster in the simulator
than the problem's optimum. This module knows plans, and how the simulator counts. It does not look
for orders.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.lower.routes import Route
from planner.order.memory import units_of
from planner.order.operations import Hop, Operations, Sequences
from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan, StagePlan
from planner.schedule import ComputeStep, Order
from planner.schedule.order import backward_steps, forward_step
from planner.simulate.durations import Durations
from planner.solve.types import Placement

__all__ = ["operations_of", "order_of_sequences", "sequences_of"]

TICKS = 2000
"""That the longest operation takes, where durations have no common measure."""
NOTHING = 1e-9
"""Of the longest operation: what takes less takes no time."""
MAX_PARTS = 60
"""Of the shortest operation, that count as a common measure."""


def operations_of(
    plan: Plan, placement: Placement, limit_bytes: Sequence[int], *, layered: bool
) -> Operations:
    """The problem of a placement.

    Args:
        plan: lowered in the layered order, whose pools of buffers are the smallest.
        placement: that it was lowered from.
        limit_bytes: per pipeline rank.
        layered: whether orders must keep to the layered rule in backward.
    """
    durations = Durations(plan=plan, cluster=plan.cluster)
    seconds = _seconds(plan, durations)
    tick = _tick([*seconds.forward, *seconds.rebuild, *seconds.backward, *seconds.update,
                  *(hop.seconds for hop in (*seconds.arrivals, *seconds.returns))])  # fmt: skip

    def ticks(values: Iterable[float]) -> tuple[int, ...]:
        return tuple(int(value / tick + 1e-6) for value in values)

    def hops(found: Iterable[_Hop]) -> tuple[Hop, ...]:
        return tuple(
            Hop(source=hop.source, target=hop.target, ticks=int(hop.seconds / tick + 1e-6))
            for hop in found
        )

    memory = units_of(plan, placement, limit_bytes)
    return Operations(
        num_micro_batches=plan.num_micro_batches,
        stage_ranks=placement.stage_ranks,
        forward=ticks(seconds.forward),
        rebuild=ticks(seconds.rebuild),
        backward=ticks(seconds.backward),
        arrivals=hops(seconds.arrivals),
        returns=hops(seconds.returns),
        update=ticks(seconds.update),
        held=memory.held,
        forward_extra=memory.forward_extra,
        backward_extra=memory.backward_extra,
        capacity=memory.capacity,
        layered=layered,
        tick_seconds=tick,
        unit_bytes=memory.unit_bytes,
    )


def order_of_sequences(operations: Operations, sequences: Sequences, placement: Placement) -> Order:
    """The order of compute steps; a RECOMPUTE stands right before its BACKWARD."""
    ranks = []
    for sequence in sequences:
        steps: list[ComputeStep] = []
        for operation in sequence:
            is_backward, stage, micro_batch = operations.place(operation)
            if is_backward:
                steps += backward_steps(placement, stage, (micro_batch,))
            else:
                steps.append(forward_step(stage, micro_batch))
        ranks.append(tuple(steps))
    return Order(ranks=tuple(ranks))


def sequences_of(operations: Operations, order: Order) -> Sequences | None:
    """The operations of an order; None where it runs backward in halves."""
    found = []
    for steps in order.ranks:
        sequence = []
        for step in steps:
            if step.opcode is Opcode.FORWARD:
                sequence.append(operations.forward_of(step.stage, step.micro_batch))
            elif step.opcode is Opcode.BACKWARD:
                sequence.append(operations.backward_of(step.stage, step.micro_batch))
            elif step.opcode is not Opcode.RECOMPUTE:
                return None
        found.append(tuple(sequence))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hop:
    source: int
    target: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seconds:
    """By stage; hops between stages."""

    forward: list[float]
    rebuild: list[float]
    backward: list[float]
    update: list[float]
    arrivals: list[_Hop]
    returns: list[_Hop]


def _seconds(plan: Plan, durations: Durations) -> _Seconds:
    arrivals: dict[tuple[int, int], float] = {}
    returns: dict[tuple[int, int], float] = {}
    for route, num_bytes in _routes(plan):
        for found, hops in ((arrivals, _forward(route)), (returns, _backward(route))):
            for source, target in hops:
                ranks = plan.stages[source].rank, plan.stages[target].rank
                seconds = found.get((source, target), 0.0)
                if ranks[0] != ranks[1]:
                    path = durations.links.transfer(*ranks)
                    # Transfers of one pair of ranks follow one another.
                    seconds += path.latency_seconds + num_bytes / path.rate
                found[source, target] = seconds
    return _Seconds(
        forward=[stage.forward_seconds for stage in plan.stages],
        rebuild=[_rebuild_seconds(stage) if stage.recompute else 0.0 for stage in plan.stages],
        backward=[stage.backward_seconds for stage in plan.stages],
        update=_updates(plan, durations),
        arrivals=[_Hop(source=s, target=t, seconds=n) for (s, t), n in arrivals.items()],
        returns=[_Hop(source=s, target=t, seconds=n) for (s, t), n in returns.items()],
    )


def _rebuild_seconds(stage: StagePlan) -> float:
    return stage.forward_seconds if stage.recompute_seconds is None else stage.recompute_seconds


def _routes(plan: Plan) -> Iterable[tuple[Route, int]]:
    """The route of every boundary tensor, and its bytes."""
    makers = {name: stage.index for stage in plan.stages for name in stage.outputs}
    for tensor in plan.tensors:
        readers = [stage.index for stage in plan.stages if tensor.name in stage.inputs]
        chain = (makers[tensor.name], *readers)
        yield (
            Route(
                tensor=tensor.name,
                requires_grad=tensor.requires_grad,
                chain=chain,
                ranks=tuple(plan.stages[stage].rank for stage in chain),
            ),
            tensor.num_bytes,
        )


def _forward(route: Route) -> list[tuple[int, int]]:
    """(source, target): each reader takes it from the one before, or finds it on its rank."""
    found, holders = [], {route.ranks[0]: route.chain[0]}
    for before, stage, rank in zip(route.chain, route.chain[1:], route.ranks[1:], strict=False):
        found.append((holders.get(rank, before), stage))
        holders[rank] = stage
    return found


def _backward(route: Route) -> list[tuple[int, int]]:
    """(source, target) of the gradient."""
    chain = route.chain if route.requires_grad else ()
    return [(chain[i], chain[i - 1]) for i in range(len(chain) - 1, 0, -1)]


def _updates(plan: Plan, durations: Durations) -> list[float]:
    """Seconds that each stage's updates take, where they stand right behind its last backward."""
    found = [0.0] * plan.num_stages
    options = plan.options
    if plan.num_replicas > 1 or options.updates_wait or options.update_on_host:
        return found
    stages = {unit.name: unit.stages for unit in plan.units}
    order = partial_order(plan)
    for cells, work in zip(order.members, durations.works(order), strict=True):
        rank, index = cells[0]
        instruction = plan.programs[rank][index]
        users = stages.get(instruction.unit or "", ())
        if instruction.opcode is Opcode.UPDATE and len(users) == 1:
            found[users[0]] += work.seconds
    return found


def _tick(seconds: Sequence[float]) -> float:
    """Seconds of a tick: a common measure of all durations, unless it is too small."""
    longest = max(seconds, default=0.0)
    positive = [value for value in seconds if value > NOTHING * longest]
    if not positive:
        return 1.0
    shortest = min(positive)
    for parts in range(1, MAX_PARTS):
        tick = shortest / parts
        if longest / tick > 100 * TICKS:
            break
        if all(abs(value / tick - round(value / tick)) < 1e-6 for value in positive):
            return tick
    return longest / TICKS
