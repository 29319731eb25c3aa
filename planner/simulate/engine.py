"""Discrete events: when each instruction of a plan starts and ends.

A task starts when everything it waits for in the plan's partial order is over and it has been
issued; nothing else delays it. Tasks that move bytes between ranks are flows, which share links
(`sharing`): a flow's bytes leave from its start on, and arrive one latency after the last of them
has left. What happens at one moment happens in the order of the tasks' numbers, after the flows
that end then, so that two runs are equal to the last bit. Linear in the number of instructions, but
for a heap and for flows that meet.
"""

import heapq
from collections.abc import Iterable, Sequence

from planner.cluster.types import Cluster
from planner.errors import CheckError
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Opcode, Plan
from planner.simulate.account import account
from planner.simulate.durations import Durations, Work
from planner.simulate.issue import IssueClock
from planner.simulate.memory import peak_memory
from planner.simulate.sharing import Flows, Landing
from planner.simulate.types import Simulation
from planner.timeline import Event, Timeline

__all__ = ["simulate"]


def simulate(
    plan: Plan, cluster: Cluster | None = None, *, order: PartialOrder | None = None
) -> Simulation:
    """One step of the plan.

    Args:
        cluster: to run on; the plan's own where absent.
        order: the plan's partial order, where the caller has it already.

    Raises:
        CheckError: the plan cannot run to its end: a transfer has one end only, or instructions
            wait for each other.
    """
    durations = Durations(plan=plan, cluster=cluster or plan.cluster)
    if order is None:
        order = partial_order(plan)
    if order.mismatches:
        raise _stuck(order.mismatches[0].message)
    works = durations.works(order)
    starts, ends = _run(plan, durations, order, works)
    step_seconds = max(ends, default=0.0)
    accounts = account(plan, order, works, starts, ends)
    return Simulation(
        timeline=_timeline(order, starts, ends),
        busy_seconds=tuple(streams.get("compute", 0.0) for streams in accounts.stream_seconds),
        tail_seconds=step_seconds - accounts.last_backward_seconds,
        sent_bytes=tuple(
            sum(durations.tensor_bytes(i.reads[0]) for i in program if i.opcode is Opcode.SEND)
            for program in plan.programs
        ),
        memory=peak_memory(plan, order),
        stream_seconds=accounts.stream_seconds,
        exposed_seconds=accounts.exposed_seconds,
        link_bytes=accounts.link_bytes,
        link_rates=durations.links.rates(),
        exposed_by=accounts.exposed_by,
    )


def _run(
    plan: Plan, durations: Durations, order: PartialOrder, works: Sequence[Work]
) -> tuple[list[float], list[float]]:
    """Start and end of each task."""
    num_tasks = len(works)
    followers = order.followers()
    first, following = followers.starts, followers.items
    waiting = [len(found) for found in order.predecessors]
    starts, ends, ready = [0.0] * num_tasks, [0.0] * num_tasks, [0.0] * num_tasks
    flows = Flows(capacities=durations.links.capacities)
    clocks = _issue_clocks(plan, durations, order)
    # Landings of flows have numbers below 0: they come before what starts at the same moment.
    heap = [(0.0, task, 0) for task, number in enumerate(waiting) if number == 0]
    pop, push = heapq.heappop, heapq.heappush
    num_done = 0
    legs = list(works)  # that each task is at

    def schedule(landings: Iterable[Landing]) -> None:
        for seconds, flow, version in landings:
            push(heap, (seconds, flow - num_tasks, version))

    while heap:
        now, task, version = pop(heap)
        if task < 0:
            task += num_tasks
            landed = flows.end((now, task, version), legs[task].num_bytes)
            if landed is None:
                continue
            end, changed = landed
            schedule(changed)
            if (leg := legs[task].then) is not None:
                legs[task] = leg
                push(heap, (end, task, version + 1))
                continue
        else:
            if clocks and not version:
                issued = max(clocks[r].moment(i, ends) for r, i in order.members[task])
                if issued > now:
                    push(heap, (issued, task, 0))
                    continue
            work = legs[task]
            if not version:
                starts[task] = now
            if work.path is not None:
                schedule(flows.begin(task, now, work.path, work.num_bytes, version))
                continue
            end = now + work.seconds
        ends[task] = end
        num_done += 1
        for follower in following[first[task] : first[task + 1]]:
            if ready[follower] < end:
                ready[follower] = end
            waiting[follower] -= 1
            if waiting[follower] == 0:
                push(heap, (ready[follower], follower, 0))
    if num_done < num_tasks:
        raise _stuck(f"{num_tasks - num_done} instructions wait for each other")
    return starts, ends


def _issue_clocks(plan: Plan, durations: Durations, order: PartialOrder) -> list[IssueClock]:
    """None at all where issuing takes no time: the partial order then says all there is to it."""
    overheads = [durations.issue_seconds(rank) for rank in range(plan.num_pipeline_ranks)]
    if not any(overheads):
        return []
    return [
        IssueClock(held_by=held_by, overhead_seconds=seconds)
        for held_by, seconds in zip(order.held_by, overheads, strict=True)
    ]


def _timeline(order: PartialOrder, starts: Sequence[float], ends: Sequence[float]) -> Timeline:
    """Start and end of each task, as events of all its members."""
    events = [
        Event(rank=rank, index=index, start_seconds=starts[task], end_seconds=ends[task])
        for rank, tasks in enumerate(order.task_of)
        for index, task in enumerate(tasks)
    ]
    return Timeline(source="simulated", events=tuple(events))


def _stuck(why: str) -> CheckError:
    return CheckError(
        f"the plan cannot run to its end: {why}",
        hint="lga-check prints the instructions concerned",
    )
