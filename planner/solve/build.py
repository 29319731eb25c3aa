"""From a choice to its Instance: the only place that turns a choice and figures into tables.

This module knows what a choice costs per layer and per cut. It does not know how to split.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from planner.cluster.types import Link
from planner.cost import (
    all_reduce_seconds,
    gather_seconds,
    reduce_scatter_seconds,
    transfer_seconds,
    update_seconds,
)
from planner.solve.choices import Choice
from planner.solve.figures import Figures, make_figures
from planner.solve.instance import Instance
from planner.solve.memory import (
    fixed_bytes,
    memory_figures,
    parameters_of,
    per_shard,
)
from planner.solve.mesh import Mesh, make_mesh
from planner.solve.problem import Problem

__all__ = ["Builder"]

# Fine enough that rounding a layer's time or bytes cannot be seen, coarse enough for CP-SAT.
HORIZON_TICKS = 2**33
LIMIT_UNITS = 2**22


class _MemoryTables(TypedDict):
    """The part of an Instance that counts memory."""

    unit_bytes: int
    kept: tuple[int, ...]
    entry_kept: tuple[int, ...]
    exit_unkept: tuple[int, ...]
    buffer: tuple[int, ...]
    rebuilt: tuple[int, ...]
    rebuilt_exit_unkept: tuple[int, ...]
    fixed_units: tuple[int, ...]
    limit_units: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Builder:
    """Makes instances, and remembers the figures of each size and the links of each mesh."""

    problem: Problem
    figures: dict[tuple[int, tuple[int, ...]], Figures] = field(default_factory=dict)
    """By micro-batch size and identity of the kinds of device."""
    meshes: dict[tuple[int, int], Mesh] = field(default_factory=dict)

    def mesh_of(self, choice: Choice) -> Mesh:
        key = (choice.num_replicas, choice.num_pipeline_ranks)
        if key not in self.meshes:
            self.meshes[key] = make_mesh(self.problem, *key)
        return self.meshes[key]

    def figures_of(self, choice: Choice) -> Figures:
        size, devices = choice.micro_batch_size, self.mesh_of(choice).devices
        key = (size, tuple(id(device) for device in devices))
        if key not in self.figures:
            self.figures[key] = make_figures(
                self.problem.graph_at(size), self.problem.profile_at(size), devices
            )
        return self.figures[key]

    def instance(self, choice: Choice) -> Instance:
        """The split problem that a choice leaves."""
        figures, mesh = self.figures_of(choice), self.mesh_of(choice)
        forward, backward = figures.forward_seconds, figures.backward_seconds
        traffic = _traffic(figures, choice, mesh)
        horizon = 2 * choice.num_micro_batches * (2 * sum(forward) + sum(backward))
        tick = max(horizon + sum(traffic.gather) + sum(traffic.reduce), 1e-12) / HORIZON_TICKS

        def ticks(seconds: Iterable[float]) -> list[int]:
            return [round(value / tick) for value in seconds]

        return Instance(
            choice=choice,
            num_layers=figures.num_layers,
            tick_seconds=tick,
            forward=_prefix(ticks(forward)),
            backward=_prefix(ticks(backward)),
            update=_prefix(ticks(self._updates(choice))),
            gather=_prefix(ticks(traffic.gather)),
            reduce=_prefix(ticks(traffic.reduce)),
            gather_per_stage=round(traffic.gather_latency / tick),
            reduce_per_stage=round(traffic.reduce_latency / tick),
            tied_ticks=round(traffic.tied / tick),
            hops=tuple(
                tuple(ticks(_transfer(count, link) for count in figures.crossing_bytes))
                for link in mesh.ring_links
            ),
            gradient_hops=tuple(
                tuple(ticks(_transfer(count, link) for count in figures.gradient_crossing_bytes))
                for link in mesh.ring_links
            ),
            hop_kinds=mesh.ring_kinds,
            **self._memory_tables(choice),
        )

    def _updates(self, choice: Choice) -> list[float]:
        """Seconds per layer, without the overhead that a stage's one update has."""
        counts = per_shard(
            parameters_of(self.figures_of(choice), choice).trainable_elements, choice
        )
        device, slots = self.mesh_of(choice).devices[0], self.problem.optimizer_slots
        per_element, _ = _affine(lambda count: update_seconds(count, device, slots))
        return [per_element * count for count in counts]

    def _memory_tables(self, choice: Choice) -> _MemoryTables:
        figures, limits = self.figures_of(choice), self.mesh_of(choice).limit_bytes
        memory = memory_figures(figures, choice, self.problem.optimizer_slots)
        unit = max(1, min(limits) // LIMIT_UNITS)
        return _MemoryTables(
            unit_bytes=unit,
            kept=_prefix(_units(memory.kept, unit)),
            entry_kept=tuple(_units(memory.entry, unit)),
            exit_unkept=tuple(num_bytes // unit for num_bytes in memory.exit),
            buffer=_prefix(_units(memory.buffers, unit)),
            rebuilt=_prefix(_units(memory.rebuilt, unit)),
            rebuilt_exit_unkept=tuple(num_bytes // unit for num_bytes in memory.rebuilt_exit),
            fixed_units=tuple(_units(fixed_bytes(figures, choice), unit)),
            limit_units=tuple(limit // unit for limit in limits),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traffic:
    """Seconds of data-parallel transfers."""

    gather: list[float]
    """Per layer."""
    reduce: list[float]
    gather_latency: float
    """Per stage."""
    reduce_latency: float
    tied: float
    """To add gradients of tied weights between two ranks, after everything else."""


def _traffic(figures: Figures, choice: Choice, mesh: Mesh) -> _Traffic:
    replicas, link = choice.num_replicas, mesh.group_link
    parameters = parameters_of(figures, choice)
    reduce_whole = reduce_scatter_seconds if choice.partition else all_reduce_seconds
    reduce, reduce_latency = _affine(lambda count: reduce_whole(count, replicas, link))
    gather, gather_latency = _affine(lambda count: gather_seconds(count, replicas, link))
    if not choice.partition:
        gather = gather_latency = 0.0
    tied = 0.0
    if choice.num_pipeline_ranks > 1 and figures.tied_bytes:
        (num_bytes,) = per_shard([figures.tied_bytes], choice)
        tied = max(all_reduce_seconds(num_bytes, 2, link) for link in mesh.ring_links)
    return _Traffic(
        gather=[gather * count for count in parameters.weight_bytes],
        reduce=[reduce * count for count in parameters.trainable_bytes],
        gather_latency=gather_latency,
        reduce_latency=reduce_latency,
        tied=tied,
    )


def _affine(seconds: Callable[[int], float]) -> tuple[float, float]:
    """(seconds per item, seconds of latency) where time is affine in the number of items."""
    probe = 1 << 30
    slope = (seconds(2 * probe) - seconds(probe)) / probe
    return slope, max(0.0, seconds(probe) - slope * probe)


def _transfer(num_bytes: int, link: Link) -> float:
    return transfer_seconds(num_bytes, link) if num_bytes else 0.0


def _units(values: Iterable[int], unit: int) -> list[int]:
    return [-(-num_bytes // unit) for num_bytes in values]


def _prefix(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(values, initial=0))
