"""Discrete events: when each instruction of a plan starts and ends.

A task starts when everything it waits for in the plan's partial order is over; nothing else delays
it, but for one thing: transfers that leave (or reach) one rank over the same link share it, in the
order in which they become ready. A transfer holds the link for bytes / bandwidth and arrives one
latency later. Collectives run beside transfers at full bandwidth: that is the model's optimism.
Linear in the number of instructions, but for a heap.
"""

import heapq

from planner.cluster.types import Cluster
from planner.cost import transfer_seconds
from planner.errors import CheckError
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Opcode, Plan
from planner.simulate.durations import Durations
from planner.simulate.memory import peak_memory
from planner.simulate.types import Simulation
from planner.timeline import Event, Timeline

__all__ = ["simulate"]


def simulate(plan: Plan, cluster: Cluster | None = None) -> Simulation:
    """One step of the plan on `cluster` (the plan's own where absent).

    Raises:
        CheckError: the plan cannot run to its end: a transfer has one end only, or instructions
            wait for each other.
    """
    durations = Durations(plan=plan, cluster=cluster or plan.cluster)
    timeline = _run(plan, durations)
    busy = [0.0] * plan.num_pipeline_ranks
    last_backward = 0.0
    for event in timeline.events:
        instruction = plan.programs[event.rank][event.index]
        if instruction.stream == "compute":
            busy[event.rank] += event.end_seconds - event.start_seconds
        if instruction.opcode is Opcode.BACKWARD:
            last_backward = max(last_backward, event.end_seconds)
    return Simulation(
        timeline=timeline,
        busy_seconds=tuple(busy),
        tail_seconds=timeline.step_seconds - last_backward,
        sent_bytes=tuple(
            sum(durations.tensor_bytes(i.reads[0]) for i in program if i.opcode is Opcode.SEND)
            for program in plan.programs
        ),
        memory=peak_memory(plan),
    )


def _run(plan: Plan, durations: Durations) -> Timeline:
    order = partial_order(plan)
    if order.mismatches:
        raise _stuck(order.mismatches[0].message)
    followers = order.followers()
    waiting = [len(found) for found in order.predecessors]
    ready_seconds = [0.0] * len(waiting)
    link_free: dict[tuple[int, str, bool], float] = {}
    heap = [(0.0, task) for task, number in enumerate(waiting) if number == 0]
    spans: list[tuple[float, float]] = [(0.0, 0.0)] * len(waiting)
    num_done = 0
    while heap:
        ready, task = heapq.heappop(heap)
        num_done += 1
        rank, index = order.members[task][0]
        instruction = plan.programs[rank][index]
        start, end = ready, ready
        if instruction.opcode is Opcode.SEND:
            peer = order.members[task][1][0]
            link = durations.link(rank, peer)
            leaving, arriving = (rank, link.name, True), (peer, link.name, False)
            start = max(ready, link_free.get(leaving, 0.0), link_free.get(arriving, 0.0))
            num_bytes = durations.tensor_bytes(instruction.reads[0])
            end = start + transfer_seconds(num_bytes, link)
            link_free[leaving] = link_free[arriving] = end - link.latency_seconds
        else:
            end += durations.seconds(rank, instruction)
        spans[task] = (start, end)
        for follower in followers[task]:
            ready_seconds[follower] = max(ready_seconds[follower], end)
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(heap, (ready_seconds[follower], follower))
    if num_done < len(waiting):
        raise _stuck(f"{len(waiting) - num_done} instructions wait for each other")
    return _timeline(order, spans)


def _timeline(order: PartialOrder, spans: list[tuple[float, float]]) -> Timeline:
    """Start and end of each task, as events of all its members."""
    events = [
        Event(rank=rank, index=index, start_seconds=spans[task][0], end_seconds=spans[task][1])
        for rank, tasks in enumerate(order.task_of)
        for index, task in enumerate(tasks)
    ]
    return Timeline(source="simulated", events=tuple(events))


def _stuck(why: str) -> CheckError:
    return CheckError(
        f"the plan cannot run to its end: {why}",
        hint="lga-check prints the instructions concerned",
    )
