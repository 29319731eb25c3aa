"""Times the contenders of benchmarks/gpu.py, each part in a process of its own.

A process has the whole capped memory, and leaves nothing behind, pinned memory included. This
module knows processes, clocks and timelines. It does not know what a contender does.
"""

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from gpu_contenders import ByHand, Contender, Fsdp, Planned, example_batch, in_memory, offloaded
from versus_torch_model import Sizes

from planner.heap import keep_freed_memory
from planner.plan.types import Instruction
from planner.schedules import Schedule
from planner.timeline import Timeline

__all__ = ["Found", "Way", "hidden_share", "measure"]

_WARM_UP_STEPS = 2
Span = tuple[float, float]


class Way(StrEnum):
    """Of training."""

    LAYERED = "plan, layered, state in host memory"
    PLAIN = "plan, plain order, state in host memory"
    FSDP_SUMS_HERE = "FSDP2, CPUOffloadPolicy, gradients summed on the device"
    FSDP_SUMS_AWAY = "FSDP2, CPUOffloadPolicy, gradients leave every micro-batch"
    IN_MEMORY = "plan, state on the device"
    BY_HAND = "the same layers back to back"

    @property
    def is_away(self) -> bool:
        """Whether the state is in host memory."""
        return self not in (Way.IN_MEMORY, Way.BY_HAND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one way took."""

    way: Way
    seconds: tuple[float, ...] = ()
    """Of a step, in each round; empty where it did not run."""
    loss: float = 0.0
    """Of the first step's last micro-batch."""
    peak_bytes: int = 0
    """Of the device's memory; 0 on a CPU."""
    hidden_copies: float | None = None
    """Of a plan: the share of copies' time during which compute ran."""
    beside: "Found | None" = None
    """What took turns with it."""
    problem: str = ""
    """Why it did not run."""


def measure(
    way: Way,
    sizes: Sizes,
    device: torch.device,
    cap_bytes: int | None,
    num_rounds: int,
    num_steps: int,
) -> Found:
    """In a new process; `cap_bytes` is what it may take of a GPU's memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, way, sizes, device, cap_bytes, num_rounds, num_steps)
    process = context.Process(target=_run, args=arguments)
    process.start()
    sender.close()
    try:
        found: Found = receiver.recv()
    except EOFError:
        found = Found(way=way, problem="its process died")
    process.join()
    return found


def _run(
    sender: Any,
    way: Way,
    sizes: Sizes,
    device: torch.device,
    cap_bytes: int | None,
    num_rounds: int,
    num_steps: int,
) -> None:
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        if cap_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total), device)
    try:
        found = _measured(way, sizes, device, num_rounds, num_steps)
    except torch.OutOfMemoryError:
        found = Found(way=way, problem="does not fit")
    except RuntimeError as error:
        found = Found(way=way, problem=str(error).split("\n")[0])
    sender.send(found)


def _measured(
    way: Way, sizes: Sizes, device: torch.device, num_rounds: int, num_steps: int
) -> Found:
    batch = example_batch(sizes)
    if way is not Way.IN_MEMORY:
        return _timed(
            {way: _build(way, sizes, device)}, {way: batch}, device, num_rounds, num_steps
        )
    both: dict[Way, Contender] = {
        Way.IN_MEMORY: in_memory(sizes, device),
        Way.BY_HAND: ByHand(sizes, device),
    }
    there = {key: value.to(device) for key, value in batch.items()}
    batches = {Way.IN_MEMORY: batch, Way.BY_HAND: there}
    return _timed(both, batches, device, num_rounds, num_steps)


def _build(way: Way, sizes: Sizes, device: torch.device) -> Contender:
    match way:
        case Way.LAYERED:
            return offloaded(sizes, Schedule.LAYERED, device)
        case Way.PLAIN:
            return offloaded(sizes, Schedule.PLAIN, device)
    return Fsdp(sizes, device, sums_on_device=way is Way.FSDP_SUMS_HERE)


def _timed(
    contenders: dict[Way, Contender],
    batches: dict[Way, dict[str, torch.Tensor]],
    device: torch.device,
    num_rounds: int,
    num_steps: int,
) -> Found:
    """The first contender's figures; another one's are beside them."""
    losses = {way: float(each.step(batches[way])) for way, each in contenders.items()}
    for way, contender in contenders.items():
        for _ in range(_WARM_UP_STEPS - 1):
            contender.step(batches[way])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[Way, list[float]] = {way: [] for way in contenders}
    for turn in range(num_rounds):
        ways = list(contenders)
        for way in ways if turn % 2 == 0 else reversed(ways):
            start = _now(device)
            for _ in range(num_steps):
                contenders[way].step(batches[way])
            seconds[way].append((_now(device) - start) / num_steps)
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    found: Found | None = None
    for way, contender in reversed(contenders.items()):
        hidden = None
        if isinstance(contender, Planned) and way.is_away:
            hidden = hidden_share(*contender.last_step())
        found = Found(
            way=way,
            seconds=tuple(seconds[way]),
            loss=losses[way],
            peak_bytes=peak_bytes,
            hidden_copies=hidden,
            beside=found,
        )
    assert found is not None
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hidden_share(program: Sequence[Instruction], timeline: Timeline) -> float:
    """The share of copies' time during which compute ran."""
    compute, copies = list[Span](), list[Span]()
    for instruction, event in zip(program, timeline.events, strict=True):
        span = event.start_seconds, event.end_seconds
        if instruction.stream == "compute":
            compute.append(span)
        elif instruction.stream.startswith("copy."):
            copies.append(span)
    total = sum(end - start for start, end in copies)
    joined = _joined(compute)
    hidden = sum(
        max(0.0, min(end, last) - max(start, first))
        for start, end in copies
        for first, last in joined
    )
    return hidden / total if total else 0.0


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Without overlaps."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
