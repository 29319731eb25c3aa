"""Rule 4: every transfer and collective has all its ends, in an order that cannot deadlock."""

import networkx

from planner.check.expected import Expected
from planner.check.table import instruction_label
from planner.check.types import Failure
from planner.plan.dependencies import PartialOrder
from planner.plan.names import buffer_key
from planner.plan.types import Opcode, Plan

__all__ = ["transfers_match"]

_MAX_NAMES = 24
_MAX_SEARCHES = 32
"""Instructions of a circle from which a shorter one is sought."""


def transfers_match(plan: Plan, order: PartialOrder, tasks: list[int]) -> Failure | None:
    """Rule 4: the k-th SEND between two ranks meets the k-th RECEIVE of the same tensor.

    No deadlock even if every send blocks until its receive (rendezvous): the graph of all
    instructions, a transfer or collective being one node, has no cycle. Its edges are the plan's
    own order, and the order of issue by one thread that waits for compute and nothing else. So it
    is enough that all of them can be put in one order.

    Args:
        tasks: those of `order` that can run, in such an order.
    """
    if order.mismatches:
        first = order.mismatches[0]
        cell = (first.rank, first.index)
        others = [c for c in order.members[order.task_of[first.rank][first.index]] if c != cell]
        return Failure(message=first.message, cells=(cell, *others))
    failure = _unlike_ends(plan, order)
    if failure or len(tasks) == len(order.members):
        return failure
    circle = _circle(order, tasks)
    cells = tuple(cell for task in circle for cell in order.members[task])
    names = [_name(plan, order, task) for task in circle]
    if len(names) > _MAX_NAMES:
        names[_MAX_NAMES // 2 : -_MAX_NAMES // 2] = [f"... {len(names) - _MAX_NAMES} more ..."]
    return Failure(
        message=f"deadlock: {len(circle)} instructions wait for each other in a circle; each "
        "waits for the one before it:\n  " + "\n  -> ".join((*names, names[0])),
        cells=cells,
    )


def _unlike_ends(plan: Plan, order: PartialOrder) -> Failure | None:
    """A transfer whose buffers differ in type or shape, or that is not the tensor it should be."""
    expected = Expected(plan)
    known: dict[tuple[str, int, int], str] = {}
    for cells in order.members:
        if len(cells) < 2:
            continue
        (rank, index), (receiver, position) = cells[:2]
        send = plan.programs[rank][index]
        if send.opcode is not Opcode.SEND:
            continue
        buffer = send.reads[0]
        key = buffer_key(buffer)
        fault = known.get((key, rank, receiver))
        if fault is None:
            fault = known[key, rank, receiver] = _entry_fault(expected, key, (rank, receiver))
        tensor = key.removeprefix("gradient:")
        for cell, step in ((cells[0], send), (cells[1], plan.programs[receiver][position])):
            if not fault and buffer != f"{key}.{step.micro_batch}":
                fault = f"this {step.opcode.value} is of micro-batch {step.micro_batch}, but moves "
                fault += buffer
            if not fault and step.stage not in (
                *expected.makers[tensor],
                *expected.readers[tensor],
            ):
                fault = f"stage {step.stage} neither makes nor reads {tensor}"
            if not fault and plan.stages[step.stage or 0].rank != receiver:
                fault = f"stage {step.stage} is not on rank {receiver}, which receives for it"
            if fault:
                return Failure(message=fault, cells=(cell, *(c for c in cells if c != cell)))
    return None


def _entry_fault(expected: Expected, key: str, ranks: tuple[int, int]) -> str:
    """How the tables of two ranks differ from the tensor that they exchange."""
    if key.removeprefix("gradient:") not in expected.tensors:
        return f"{key} is no tensor between stages"
    faults = [
        f"on rank {rank} {expected.unfit[rank][key]}"
        for rank in ranks
        if key in expected.unfit[rank]
    ]
    return "; ".join(faults)


def _circle(order: PartialOrder, tasks: list[int]) -> list[int]:
    """A short cycle among the tasks that cannot run, each waiting for the one before it."""
    done = bytearray(len(order.members))
    for task in tasks:
        done[task] = 1
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    for task, earlier in enumerate(order.predecessors):
        if not done[task]:
            graph.add_edges_from((other, task) for other in earlier if not done[other])
    circle = [task for task, _ in networkx.find_cycle(graph)]
    for task in circle[:_MAX_SEARCHES]:
        for follower in graph.successors(task):
            try:
                shorter = networkx.shortest_path(graph, follower, task)
            except networkx.NetworkXNoPath:
                continue
            if len(shorter) < len(circle):
                circle = shorter
    return circle


def _name(plan: Plan, order: PartialOrder, task: int) -> str:
    ranks = sorted({rank for rank, _ in order.members[task]})
    rank, index = order.members[task][0]
    where = f"rank {rank}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{instruction_label(plan.programs[rank][index])} on {where}"
