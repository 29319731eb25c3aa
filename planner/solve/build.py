"""From a choice to its Instance: the only place that turns a choice and figures into tables.

This module knows what a choice costs per layer and per cut. It does not know how to split.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from planner.cost import update_seconds
from planner.solve.choices import Choice
from planner.solve.figures import Figures, make_figures
from planner.solve.instance import Instance
from planner.solve.memory import (
    MemoryFigures,
    fixed_bytes,
    memory_figures,
    parameters_of,
    per_shard,
)
from planner.solve.mesh import Mesh, make_mesh
from planner.solve.problem import Problem
from planner.solve.traffic import RingTraffic, affine, collectives, ring_traffic

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
    rings: dict[tuple[int, int, int, int], RingTraffic] = field(default_factory=dict)
    """By micro-batch size, mesh and number of stages."""

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

    def _ring_of(self, choice: Choice) -> RingTraffic:
        mesh = (choice.num_replicas, choice.num_pipeline_ranks)
        key = (choice.micro_batch_size, *mesh, choice.num_stages)
        if key not in self.rings:
            figures = self.figures_of(choice)
            self.rings[key] = ring_traffic(figures, choice, self.mesh_of(choice))
        return self.rings[key]

    def instance(self, choice: Choice) -> Instance:
        """The split problem that a choice leaves."""
        figures, mesh = self.figures_of(choice), self.mesh_of(choice)
        forward, backward = figures.forward_seconds, figures.backward_seconds
        traffic, ring = collectives(figures, choice, mesh), self._ring_of(choice)
        horizon = 2 * choice.num_micro_batches * (2 * sum(forward) + sum(backward))
        tick = max(horizon + sum(traffic.gather) + sum(traffic.reduce), 1e-12) / HORIZON_TICKS

        def ticks(seconds: Iterable[float]) -> tuple[int, ...]:
            return tuple(round(value / tick) for value in seconds)

        updates, update_floor = self._updates(choice)
        return Instance(
            choice=choice,
            num_layers=figures.num_layers,
            tick_seconds=tick,
            forward=_prefix(ticks(forward)),
            backward=_prefix(ticks(backward)),
            update=_prefix(ticks(updates)),
            least_update=round(update_floor / tick),
            gather=_prefix(ticks(traffic.gather)),
            reduce=_prefix(ticks(traffic.reduce)),
            gather_per_stage=round(traffic.gather_latency / tick),
            reduce_per_stage=round(traffic.reduce_latency / tick),
            tied_ticks=round(traffic.tied / tick),
            hops=tuple(ticks(seconds) for seconds in ring.hop_seconds),
            gradient_hops=tuple(ticks(seconds) for seconds in ring.gradient_hop_seconds),
            hop_kinds=mesh.ring_kinds,
            entry=ticks(ring.entry_seconds),
            exit=ticks(ring.exit_seconds),
            gradient_entry=ticks(ring.gradient_entry_seconds),
            gradient_exit=ticks(ring.gradient_exit_seconds),
            **self._memory_tables(choice),
        )

    def _updates(self, choice: Choice) -> tuple[list[float], float]:
        """Seconds per layer, and the least that a stage's update takes: a kernel's overhead."""
        words = parameters_of(self.figures_of(choice), choice).trainable_words
        device, slots = self.mesh_of(choice).devices[0], self.problem.optimizer_slots
        per_word, _ = affine(lambda count: update_seconds(count, device, slots))
        floor = update_seconds(0, device, slots) if all(words) else 0.0
        return [per_word * count for count in per_shard(words, choice)], floor

    def memory_of(self, choice: Choice) -> MemoryFigures:
        """Bytes of each layer and cut."""
        return memory_figures(
            self.figures_of(choice),
            choice,
            self.problem.optimizer_slots,
            updates_wait=self.problem.updates_wait,
            stages_sums=self.problem.cluster.backend == "gloo",
        )

    def _memory_tables(self, choice: Choice) -> _MemoryTables:
        figures, limits = self.figures_of(choice), self.mesh_of(choice).limit_bytes
        memory = self.memory_of(choice)
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


def _units(values: Iterable[int], unit: int) -> list[int]:
    return [-(-num_bytes // unit) for num_bytes in values]


def _prefix(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(values, initial=0))
