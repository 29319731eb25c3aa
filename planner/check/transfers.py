"""Rule 4: every transfer and collective has all its ends, in an order that cannot deadlock."""

import networkx

from planner.check.types import Failure
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Opcode, Plan

__all__ = ["transfers_match"]


def transfers_match(plan: Plan) -> Failure | None:
    """Rule 4: the k-th SEND between two ranks meets the k-th RECEIVE of the same tensor.

    No deadlock even if every send blocks until its receive (rendezvous): the graph of all
    instructions, a transfer or collective being one node, has no cycle. Its edges are the plan's
    own order, and the order of issue by one thread that waits for compute and nothing else.
    """
    failure = _badly_formed(plan)
    if failure:
        return failure
    order = partial_order(plan, issue_order=True)
    if order.mismatches:
        first = order.mismatches[0]
        return Failure(message=first.message, cells=_cells_of(order, first.rank, first.index))
    done = set(order.sorted_tasks())
    stuck = [task for task in range(len(order.members)) if task not in done]
    if not stuck:
        return None
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_edges_from((earlier, task) for task in stuck for earlier in order.predecessors[task])
    cycle = [task for task, _ in networkx.find_cycle(graph)]
    cells = tuple(cell for task in cycle for cell in order.members[task])
    return Failure(
        message=f"deadlock: {len(cycle)} instructions wait for each other in a circle: "
        + " -> ".join(_name(plan, order, task) for task in (*cycle[:8], cycle[0])),
        cells=cells,
    )


def _badly_formed(plan: Plan) -> Failure | None:
    """A transfer outside the stream of its peer and direction could overtake another's."""
    units = {unit.name: unit for unit in plan.units}
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            match instruction.opcode:
                case Opcode.SEND:
                    wanted = f"to.{instruction.peer}"
                case Opcode.RECEIVE:
                    wanted = f"from.{instruction.peer}"
                case Opcode.GATHER | Opcode.REDUCE | Opcode.REDUCE_TIED:
                    wanted = "data"
                    if rank not in units[instruction.unit or ""].ranks:
                        message = f"rank {rank} does not hold unit {instruction.unit}"
                        return Failure(message=message, cells=((rank, index),))
                case _:
                    continue
            buffers = (*instruction.reads, *instruction.writes)
            micro_batch = instruction.micro_batch
            if micro_batch is not None and not buffers[0].endswith(f".{micro_batch}"):
                message = f"this {instruction.opcode.value} of micro-batch {micro_batch} moves "
                return Failure(message=message + buffers[0], cells=((rank, index),))
            if instruction.stream != wanted:
                message = f"this {instruction.opcode.value} is on stream {instruction.stream}, "
                message += f"where its partner's order is kept on {wanted}"
                return Failure(message=message, cells=((rank, index),))
    return None


def _cells_of(order: PartialOrder, rank: int, index: int) -> tuple[tuple[int, int], ...]:
    others = [cell for cell in order.members[order.task_of[rank][index]] if cell != (rank, index)]
    return ((rank, index), *others)


def _name(plan: Plan, order: PartialOrder, task: int) -> str:
    rank, index = order.members[task][0]
    instruction = plan.programs[rank][index]
    what = instruction.unit or f"{instruction.stage}.{instruction.micro_batch}"
    return f"{instruction.opcode.value} {what} on rank {rank}"
