"""What a simulated step spent its time and its links on.

Exposed communication of a rank is idle time of its compute stream that communication explains.
Before a compute instruction, the stream is idle until the last of what the instruction waits for is
over. Going back from there along whatever was over last, through all ranks, until the stream's
previous compute instruction: the time in transfers, collectives and copies on that path is exposed
communication; the time in other ranks' compute is the pipeline's own bubble. This module does not
decide when anything runs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.plan.dependencies import PartialOrder
from planner.plan.types import Opcode, Plan
from planner.simulate.durations import Work
from planner.simulate.links import Path

__all__ = ["Account", "account"]

_BACKWARD = (Opcode.BACKWARD, Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Sums over one step; per pipeline rank unless stated."""

    stream_seconds: tuple[Mapping[str, float], ...]
    exposed_by: tuple[Mapping[str, float], ...]
    """By opcode."""
    link_bytes: Mapping[str, float]
    """Of the whole cluster."""
    last_backward_seconds: float
    """When the last rank's last backward is over."""

    @property
    def exposed_seconds(self) -> tuple[float, ...]:
        return tuple(math.fsum(found.values()) for found in self.exposed_by)


def account(
    plan: Plan,
    order: PartialOrder,
    works: Sequence[Work],
    starts: Sequence[float],
    ends: Sequence[float],
) -> Account:
    """Add it all up; arguments are per task, but for the plan."""
    streams, exposed, last_backward = [], [], 0.0
    for program, tasks in zip(plan.programs, order.task_of, strict=True):
        busy: dict[str, float] = {}
        hidden_until = 0.0
        waited: dict[str, float] = {}
        for instruction, task in zip(program, tasks, strict=True):
            stream, start, end = instruction.stream, starts[task], ends[task]
            busy[stream] = busy.get(stream, 0.0) + (end - start)
            if stream == "compute":
                if start > hidden_until:
                    _add_exposed(waited, plan, order, starts, ends, task, hidden_until)
                hidden_until = end
                if end > last_backward and instruction.opcode in _BACKWARD:
                    last_backward = end
        streams.append(busy)
        exposed.append(waited)
    return Account(
        stream_seconds=tuple(streams),
        exposed_by=tuple(exposed),
        link_bytes=_link_bytes(works),
        last_backward_seconds=last_backward,
    )


def _add_exposed(
    waited: dict[str, float],
    plan: Plan,
    order: PartialOrder,
    starts: Sequence[float],
    ends: Sequence[float],
    task: int,
    idle_from: float,
) -> None:
    """Add communication on the path that led to `task`, back to where its stream fell idle."""
    moment = starts[task]
    while moment > idle_from and order.predecessors[task]:
        task = max(order.predecessors[task], key=lambda earlier: (ends[earlier], -earlier))
        rank, index = order.members[task][0]
        start = max(starts[task], idle_from)
        instruction = plan.programs[rank][index]
        if instruction.stream != "compute":
            name = "RECEIVE" if instruction.opcode is Opcode.SEND else instruction.opcode.value
            waited[name] = waited.get(name, 0.0) + max(0.0, min(ends[task], moment) - start)
        moment = start


def _link_bytes(works: Sequence[Work]) -> dict[str, float]:
    """Bytes through each port and adapter, by name, sorted."""
    by_path: dict[int, tuple[Path, float]] = {}
    for leg in itertools.chain.from_iterable(work.legs() for work in works):
        if leg.path is not None:
            _, before = by_path.get(id(leg.path), (leg.path, 0.0))
            by_path[id(leg.path)] = leg.path, before + leg.num_bytes
    found: dict[str, float] = {}
    for path, num_bytes in by_path.values():
        for name, number in path.counted:
            found[name] = found.get(name, 0.0) + number * num_bytes
    return dict(sorted(found.items()))
