"""From a choice to its Instance: the only place that turns a choice and figures into tables.

This module knows what a choice costs per layer and per cut. It does not know how to split.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from planner.cluster.types import Device
from planner.cost import num_rounds
from planner.layouts import Grid
from planner.partitions import gathers_for_passes, gathers_updates
from planner.solve.choices import Choice
from planner.solve.crossings import Crossings, make_crossings
from planner.solve.figures import Figures, LayerTimes, layer_times, make_figures
from planner.solve.instance import Instance, RankTables
from planner.solve.memory import (
    fixed_bytes,
    num_buffers,
    parameters_of,
    per_shard,
)
from planner.solve.memory_tables import memory_tables
from planner.solve.mesh import Ground, Mesh
from planner.solve.problem import Problem
from planner.solve.rank_tables import TableMaker, slowest_host, ticks_of, update_byte_seconds
from planner.solve.step_parts import Pace
from planner.solve.traffic import (
    RingTraffic,
    collectives,
    hop_seconds,
    ring_traffic,
    tied_seconds,
)

__all__ = ["Builder"]

# Fine enough that rounding a layer's time or bytes cannot be seen, coarse enough for CP-SAT.
HORIZON_TICKS = 2**33
LIMIT_UNITS = 2**22


@dataclass(kw_only=True)
class Builder:
    """Makes instances, and remembers the figures of each size and the links of each mesh."""

    problem: Problem
    _figures: dict[int, Figures] = field(default_factory=dict)
    """By micro-batch size."""
    _times: dict[tuple[int, tuple[int, ...]], LayerTimes] = field(default_factory=dict)
    """By micro-batch size and identity of the kinds of device."""
    _meshes: dict[Grid, Mesh] = field(default_factory=dict)
    _rings: dict[object, RingTraffic] = field(default_factory=dict)
    _crossings: dict[tuple[int, int], Crossings] = field(default_factory=dict)
    """By micro-batch size and number of stages."""

    @cached_property
    def _ground(self) -> Ground:
        return Ground.of(self.problem)

    def mesh_of(self, choice: Choice) -> Mesh:
        grid = choice.grid
        if grid not in self._meshes:
            self._meshes[grid] = self._ground.mesh(grid)
        return self._meshes[grid]

    def figures_of(self, choice: Choice) -> Figures:
        size = choice.micro_batch_size
        if size not in self._figures:
            graph, profile = self.problem.graph_at(size), self.problem.profile_at(size)
            self._figures[size] = make_figures(graph, profile)
        return self._figures[size]

    def _times_of(self, choice: Choice, devices: tuple[Device, ...]) -> LayerTimes:
        key = (choice.micro_batch_size, tuple(map(id, devices)))
        if key not in self._times:
            profile = self.problem.profile_at(choice.micro_batch_size)
            self._times[key] = layer_times(profile, devices)
        return self._times[key]

    def _ring_of(self, choice: Choice) -> RingTraffic:
        key = (choice.micro_batch_size, choice.num_pipeline_ranks, choice.stage_ranks)
        if key not in self._rings:
            self._rings[key] = ring_traffic(self.figures_of(choice), choice)
        return self._rings[key]

    def _crossings_of(self, choice: Choice) -> Crossings:
        key = (choice.micro_batch_size, choice.num_stages)
        if key not in self._crossings:
            self._crossings[key] = make_crossings(self.figures_of(choice), choice.num_stages)
        return self._crossings[key]

    def instance(self, choice: Choice) -> Instance:
        """The split problem that a choice leaves, in ticks and units of its own."""
        limits = self.mesh_of(choice).limit_bytes
        return self.instance_in(choice, max(1, min(limits) // LIMIT_UNITS))

    def instance_in(self, choice: Choice, unit_bytes: int) -> Instance:
        """The same with units of so many bytes."""
        figures, mesh, ring = self.figures_of(choice), self.mesh_of(choice), self._ring_of(choice)
        tick, stage_ranks = self._tick(choice), choice.stage_ranks
        links = [mesh.link(one, other) for one, other in itertools.pairwise(stage_ranks)]
        kinds = list(dict.fromkeys(links)) or [mesh.kinds[0].group_link]

        def hops(messages: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(ticks_of(hop_seconds(messages, link), tick) for link in kinds)

        return Instance(
            choice=choice,
            num_layers=figures.num_layers,
            tick_seconds=tick,
            unit_bytes=unit_bytes,
            pace=self._pace(choice, tick),
            kinds=self._rank_tables(choice, tick),
            rank_kinds=mesh.rank_kinds,
            hops=hops(ring.there),
            gradient_hops=hops(ring.back),
            hop_kinds=(0, *(kinds.index(link) for link in links)),
            memory=memory_tables(
                figures, self._crossings_of(choice), choice, self.problem, unit_bytes
            ),
            fixed_units=tuple(-(-size // unit_bytes) for size in fixed_bytes(figures, choice)),
            limit_units=tuple(limit // unit_bytes for limit in mesh.limit_bytes),
        )

    def _tick(self, choice: Choice) -> float:
        """Seconds of a tick: a step of everything in sequence has at most HORIZON_TICKS."""
        mesh, figures = self.mesh_of(choice), self.figures_of(choice)
        whole = sum(parameters_of(figures, choice).shard_bytes)
        longest = 1e-12
        for kind in mesh.kinds:
            times = self._times_of(choice, kind.devices)
            compute = 2 * sum(times.forward) + sum(times.backward)
            moved = collectives(choice, kind, mesh.collectives)
            seconds = 2 * choice.num_micro_batches * compute + whole * (moved.gather + moved.reduce)
            longest = max(longest, seconds)
        return longest / HORIZON_TICKS

    def _rank_tables(self, choice: Choice, tick: float) -> tuple[RankTables, ...]:
        """Of each kind of rank."""
        mesh, figures = self.mesh_of(choice), self.figures_of(choice)
        return tuple(
            TableMaker(
                problem=self.problem,
                choice=choice,
                figures=figures,
                times=self._times_of(choice, kind.devices),
                ring=self._ring_of(choice),
                crossings=self._crossings_of(choice),
                kind=kind,
                algorithm=mesh.collectives,
                tick_seconds=tick,
                ties_end=bool(_tied_ranks(figures, choice.stage_ranks)),
            ).tables()
            for kind in mesh.kinds
        )

    def _pace(self, choice: Choice, tick: float) -> Pace:
        figures, problem, mesh = self.figures_of(choice), self.problem, self.mesh_of(choice)
        devices = [device for kind in mesh.kinds for device in kind.devices]
        updaters = [device for kind in mesh.kinds for device in kind.updaters]
        tied_ranks = _tied_ranks(figures, choice.stage_ranks)
        tied = tied_seconds(figures, choice, mesh.link(*tied_ranks)) if tied_ranks else 0.0
        issue = min(device.instruction_overhead_seconds for device in devices)
        (tied_part,) = per_shard([figures.tied_bytes], choice)
        return Pace(
            stage_ranks=choice.stage_ranks,
            num_ranks=choice.num_pipeline_ranks,
            num_micro_batches=choice.num_micro_batches,
            num_buffers=num_buffers(choice),
            gathers=gathers_for_passes(choice.partition, offload_state=choice.offload_state),
            reduces=choice.num_replicas > 1,
            gathers_updated=choice.num_replicas > 1 and gathers_updates(choice.partition),
            updates_wait=problem.updates_wait,
            num_verdicts=problem.num_verdicts,
            verdict=round(problem.num_verdicts * self._verdict_seconds(choice) / tick),
            offloads_state=choice.offload_state,
            updates_on_host=problem.updates_on_host,
            offloads_inputs=choice.offload_inputs,
            loads=any(figures.layer_batch_bytes) and (issue > 0 or slowest_host(devices) > 0),
            issue=round(issue / tick),
            tied_ranks=tied_ranks,
            tied=round(tied / tick),
            tied_update=round(
                update_byte_seconds(updaters, problem.optimizer_slots) * tied_part / tick
            ),
        )

    def _verdict_seconds(self, choice: Choice) -> float:
        """For all ranks to agree on a number: latencies alone, as there is next to nothing else."""
        cluster, size = self.problem.cluster, choice.num_replicas * choice.num_pipeline_ranks
        latencies = [cluster.hosts[0].link.latency_seconds]
        if size > cluster.hosts[0].num_devices:
            latencies = [cluster.network.latency_seconds]
        return 2 * num_rounds(size, cluster.collectives) * min(latencies)


def _tied_ranks(figures: Figures, stage_ranks: Sequence[int]) -> tuple[int, int] | tuple[()]:
    """Those that surely have tied weights, of several ranks: the first layer's, the last's."""
    tied, first, last = figures.parameters.tied_trainable_bytes, stage_ranks[0], stage_ranks[-1]
    if first == last or not (tied[0] and tied[-1]):
        return ()
    return min(first, last), max(first, last)
