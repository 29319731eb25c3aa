"""What a simulated step is made of, and what bounds it.

On every pipeline rank the step is compute, waiting that communication explains, waiting for other
ranks (the pipeline's bubble), and the end, after the rank's last compute. This module reads one
plan and its simulation. It solves nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from planner.plan.types import Opcode, Plan
from planner.simulate import MemoryByClass, Simulation

__all__ = ["Bottleneck", "LinkUse", "Shares", "find_bottleneck", "mean_shares", "rank_shares"]

_COMPUTE = {
    Opcode.FORWARD: "forward",
    Opcode.BACKWARD: "backward",
    Opcode.BACKWARD_INPUT: "backward",
    Opcode.BACKWARD_WEIGHT: "backward",
    Opcode.RECOMPUTE: "recompute",
    Opcode.UPDATE: "update",
}
_WAITS = {
    "GATHER": "gathers",
    "REDUCE": "reductions",
    "REDUCE_TIED": "reductions",
    "RECEIVE": "transfers",
    "LOAD": "copies from the host",
    "FETCH": "copies from the host",
    "EVICT": "copies to the host",
    "SAVE": "copies to the host",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Seconds of one step, of one pipeline rank or as means over ranks: they add up to the step."""

    compute: Mapping[str, float]
    """By `forward`, `backward`, `recompute`, `update` and `other`."""
    waiting: Mapping[str, float]
    """Exposed communication by what is waited for: `gathers`, `reductions`, `transfers`, copies."""
    bubble_seconds: float
    """Waiting for other ranks' compute: the pipeline fills, drains, or is uneven."""
    end_seconds: float
    """From the rank's last compute to the end of the step."""

    @property
    def compute_seconds(self) -> float:
        return math.fsum(self.compute.values())

    @property
    def waiting_seconds(self) -> float:
        return math.fsum(self.waiting.values())

    def parts(self) -> dict[str, float]:
        """All of it by name."""
        idle = self.bubble_seconds + self.end_seconds
        waiting = {f"waiting for {name}": seconds for name, seconds in self.waiting.items()}
        return {**self.compute, **waiting, "bubble": idle}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """A port or the adapters of a host, and how busy the step keeps them."""

    name: str
    num_bytes: float
    """Per step."""
    busy_seconds: float
    """That the bytes take at the full rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What bounds a step: the busiest rank, the busiest link, the fullest memory."""

    step_seconds: float
    rank: int
    """Whose compute takes longest."""
    shares: Shares
    """Of that rank."""
    link: LinkUse | None
    """None where nothing is sent, or no link is ever short."""
    memory_rank: int
    """Whose memory is nearest to its limit."""
    memory: MemoryByClass
    """Its worst moment."""
    memory_limit_bytes: int
    memory_class: str
    """The field of MemoryByClass that takes most of it."""

    @property
    def class_bytes(self) -> int:
        """Bytes of that class."""
        num_bytes: int = getattr(self.memory, self.memory_class)
        return num_bytes


def rank_shares(plan: Plan, simulation: Simulation) -> tuple[Shares, ...]:
    """What each pipeline rank's step is made of."""
    compute: list[dict[str, float]] = [{} for _ in plan.programs]
    last = [0.0] * len(compute)
    for event in simulation.timeline.events:
        instruction = plan.programs[event.rank][event.index]
        if instruction.stream != "compute":
            continue
        name = _COMPUTE.get(instruction.opcode, "other")
        seconds = event.end_seconds - event.start_seconds
        compute[event.rank][name] = compute[event.rank].get(name, 0.0) + seconds
        last[event.rank] = max(last[event.rank], event.end_seconds)
    found = []
    for rank, exposed in enumerate(simulation.exposed_by):
        waiting: dict[str, float] = {}
        for opcode, seconds in exposed.items():
            name = _WAITS.get(opcode, "other communication")
            waiting[name] = waiting.get(name, 0.0) + seconds
        used = math.fsum(compute[rank].values()) + math.fsum(waiting.values())
        found.append(
            Shares(
                compute={name: seconds for name, seconds in compute[rank].items() if seconds},
                waiting=waiting,
                bubble_seconds=max(0.0, last[rank] - used),
                end_seconds=simulation.step_seconds - last[rank],
            )
        )
    return tuple(found)


def mean_shares(ranks: Sequence[Shares]) -> Shares:
    """Over ranks; these means add up to the step too."""
    return Shares(
        compute=_mean([shares.compute for shares in ranks]),
        waiting=_mean([shares.waiting for shares in ranks]),
        bubble_seconds=math.fsum(shares.bubble_seconds for shares in ranks) / len(ranks),
        end_seconds=math.fsum(shares.end_seconds for shares in ranks) / len(ranks),
    )


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: math.fsum(part.get(name, 0.0) for part in parts) / len(parts) for name in names}


def find_bottleneck(plan: Plan, simulation: Simulation, limits: Sequence[int]) -> Bottleneck:
    """What bounds the step. `limits` are bytes per pipeline rank."""
    shares = rank_shares(plan, simulation)
    rank = max(range(len(shares)), key=lambda rank: shares[rank].compute_seconds)
    used = [
        moment.total_bytes / limit for moment, limit in zip(simulation.memory, limits, strict=True)
    ]
    memory_rank = used.index(max(used))
    memory = simulation.memory[memory_rank]
    names = [field.name for field in fields(MemoryByClass)]
    return Bottleneck(
        step_seconds=simulation.step_seconds,
        rank=rank,
        shares=shares[rank],
        link=_busiest_link(simulation),
        memory_rank=memory_rank,
        memory=memory,
        memory_limit_bytes=limits[memory_rank],
        memory_class=max(names, key=lambda name: getattr(memory, name)),
    )


def _busiest_link(simulation: Simulation) -> LinkUse | None:
    uses = [
        LinkUse(
            name=name,
            num_bytes=num_bytes,
            busy_seconds=num_bytes / simulation.link_rates[name],
        )
        for name, num_bytes in simulation.link_bytes.items()
        if num_bytes and name in simulation.link_rates
    ]
    return max(uses, key=lambda use: use.busy_seconds, default=None)
