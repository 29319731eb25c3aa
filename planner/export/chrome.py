"""Timelines as a trace that Perfetto and chrome://tracing open (JSON Trace Event Format).

Each pipeline rank is a process for each timeline, the planned and the measured one next to each
other; each stream is a thread in it. Transfers are joined by arrows. This module knows that format.
It does not know where the times come from.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from planner.plan.names import kind_of
from planner.plan.types import Instruction, Opcode, Plan
from planner.simulate import MemoryOverTime
from planner.timeline import Event, Timeline

__all__ = ["chrome_trace", "event_name"]

TraceEvent = dict[str, Any]
Cell = tuple[int, int]
"""(pipeline rank, index in its program)."""

_LETTERS = {
    Opcode.FORWARD: "F",
    Opcode.RECOMPUTE: "R",
    Opcode.BACKWARD: "B",
    Opcode.BACKWARD_INPUT: "I",
    Opcode.BACKWARD_WEIGHT: "W",
}
_WORDS = {"simulated": "planned"}
_FIRST = 1
"""Number of the first process, and of each one's first thread: 0 is the idle task to Perfetto."""
_MOVES = (Opcode.FETCH, Opcode.EVICT, Opcode.RELEASE)
_STREAMS = ("compute", "data", "copy.in", "copy.out", "host")
"""First in this order, then transfers by peer."""


def chrome_trace(
    plan: Plan,
    timelines: Sequence[Timeline],
    memory: Sequence[MemoryOverTime] = (),
) -> str:
    """All `timelines` of the plan in one trace, as JSON text.

    Args:
        plan: what the timelines ran.
        timelines: each with an event for every instruction; their sources name the processes.
        memory: of the first timeline, per pipeline rank; drawn as a stack of its classes.
    """
    threads = tuple(
        {stream: thread for thread, stream in enumerate(_streams(plan, rank), _FIRST)}
        for rank in range(plan.num_pipeline_ranks)
    )
    events: list[TraceEvent] = []
    for position, timeline in enumerate(timelines):
        drawing = _Drawing(
            plan=plan,
            timeline=timeline,
            threads=threads,
            position=position,
            num_timelines=len(timelines),
        )
        events += [*drawing.processes(), *drawing.slices(), *drawing.arrows()]
    for rank, held in enumerate(memory):
        events += _counters(held, _FIRST + rank * len(timelines))
    lines = ",\n".join(json.dumps(event) for event in events)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'


def event_name(instruction: Instruction) -> str:
    """`F 3.1` for FORWARD of stage 3, micro-batch 1; `SEND h_3.1`, `GATHER stage.3`, ...

    What FETCH, EVICT and RELEASE move of a unit's state is named: it is not the unit's weights.
    """
    if instruction.opcode in _LETTERS:
        letter = _LETTERS[instruction.opcode]
        return f"{letter} {instruction.stage}.{instruction.micro_batch}"
    leaves = instruction.opcode in (Opcode.SEND, Opcode.EVICT)
    buffers = instruction.reads if leaves else instruction.writes
    subject = buffers[0] if buffers else ""
    if instruction.unit and not (instruction.opcode in _MOVES and kind_of(subject) != "weights"):
        subject = instruction.unit
    return f"{instruction.opcode.value} {subject}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """One timeline on its way into the trace."""

    plan: Plan
    timeline: Timeline
    threads: tuple[dict[str, int], ...]
    """Per pipeline rank: thread of each stream."""
    position: int
    """Among the timelines of the trace."""
    num_timelines: int

    def process(self, rank: int) -> int:
        """The same rank's processes of all timelines stand next to each other."""
        return _FIRST + rank * self.num_timelines + self.position

    def processes(self) -> Iterator[TraceEvent]:
        """Names and places of processes and threads."""
        word = _WORDS.get(self.timeline.source, self.timeline.source)
        for rank, threads in enumerate(self.threads):
            process = self.process(rank)
            yield _metadata("process_name", process, {"name": f"rank {rank} {word}"})
            yield _metadata("process_sort_index", process, {"sort_index": process})
            for stream, thread in threads.items():
                yield _metadata("thread_name", process, {"name": stream}, thread)
                yield _metadata("thread_sort_index", process, {"sort_index": thread}, thread)

    def slices(self) -> Iterator[TraceEvent]:
        """Every instruction, as long as it took."""
        for event in self.timeline.events:
            instruction = self.plan.programs[event.rank][event.index]
            arguments: dict[str, Any] = {
                "instruction": event.index,
                "reads": " ".join(instruction.reads),
                "writes": " ".join(instruction.writes),
            }
            if instruction.unit is not None:
                arguments["unit"] = instruction.unit
            if instruction.peer is not None:
                arguments["peer"] = instruction.peer
            yield self._placed(event, event.start_seconds) | {
                "ph": "X",
                "name": event_name(instruction),
                "cat": instruction.opcode.value,
                "dur": _microseconds(event.end_seconds, event.start_seconds),
                "args": arguments,
            }

    def arrows(self) -> Iterator[TraceEvent]:
        """From each SEND to its RECEIVE: the k-th of a pair to the k-th.

        An arrow must not point back in time. A measured RECEIVE can be over before the SEND began,
        because it was only posted: the arrow then goes to the first instruction that reads what
        came. Where that is too early as well (the clocks of two hosts differ), there is none.
        """
        events = {(event.rank, event.index): event for event in self.timeline.events}
        for number, (sender, receiver, reader) in enumerate(_transfers(self.plan)):
            sent, begin = events[sender], events[sender].start_seconds
            for cell in filter(None, (receiver, reader)):
                if events[cell].end_seconds >= begin:
                    end = max(begin, events[cell].start_seconds)
                    identity = number * self.num_timelines + self.position
                    arrow = {"name": "transfer", "cat": "transfer", "id": identity}
                    yield self._placed(sent, begin) | arrow | {"ph": "s"}
                    yield self._placed(events[cell], end) | arrow | {"ph": "f", "bp": "e"}
                    break

    def _placed(self, event: Event, seconds: float) -> TraceEvent:
        """Process, thread and time."""
        stream = self.plan.programs[event.rank][event.index].stream
        return {
            "pid": self.process(event.rank),
            "tid": self.threads[event.rank][stream],
            "ts": _microseconds(seconds),
        }


def _transfers(plan: Plan) -> Iterator[tuple[Cell, Cell, Cell | None]]:
    """Cells of each SEND, its RECEIVE, and the first instruction that reads what came."""
    sends: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    readers: dict[Cell, Cell] = {}
    for rank, program in enumerate(plan.programs):
        unread: dict[str, Cell] = {}
        for index, instruction in enumerate(program):
            for buffer in instruction.reads:
                if buffer in unread:
                    readers[unread.pop(buffer)] = (rank, index)
            if instruction.opcode is Opcode.SEND and instruction.peer is not None:
                sends[rank, instruction.peer].append((rank, index))
            elif instruction.opcode is Opcode.RECEIVE and instruction.peer is not None:
                receives[instruction.peer, rank].append((rank, index))
                unread[instruction.writes[0]] = (rank, index)
    for pair in sorted(sends):
        for sender, receiver in zip(sends[pair], receives[pair], strict=False):
            yield sender, receiver, readers.get(receiver)


def _microseconds(end_seconds: float, start_seconds: float = 0.0) -> float:
    """Between two moments, each rounded to nanoseconds as viewers do, so that slices that follow
    each other do not come to overlap.
    """
    return (round(end_seconds * 1e9) - round(start_seconds * 1e9)) / 1000


def _streams(plan: Plan, rank: int) -> list[str]:
    """Streams of a rank, in the order of their threads."""
    used = {instruction.stream for instruction in plan.programs[rank]}
    peers = sorted(used.difference(_STREAMS), key=lambda name: (int(name.split(".")[1]), name))
    return [stream for stream in _STREAMS if stream in used] + peers


def _metadata(
    name: str, process: int, arguments: dict[str, Any], thread: int = _FIRST
) -> TraceEvent:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": arguments}


def _counters(held: MemoryOverTime, process: int) -> Iterator[TraceEvent]:
    for moment, seconds in enumerate(held.seconds):
        yield {
            "ph": "C",
            "name": "memory (bytes)",
            "pid": process,
            "tid": _FIRST,
            "ts": _microseconds(seconds),
            "args": {name: num_bytes[moment] for name, num_bytes in held.by_class.items()},
        }
