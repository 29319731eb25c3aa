"""From a choice to its Instance: the only place that turns a choice and figures into tables.

This module knows what a choice costs per layer and per cut. It does not know how to split.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from planner.cluster.types import Device, Link
from planner.cost import copy_seconds, num_rounds, read_seconds, update_seconds
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
    reduced_bytes,
)
from planner.solve.memory_tables import memory_tables
from planner.solve.mesh import Ground, Mesh, RankKind
from planner.solve.problem import Problem
from planner.solve.step_parts import LOOKAHEAD, Pace
from planner.solve.tables import Table
from planner.solve.traffic import (
    RingTraffic,
    affine,
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
    _meshes: dict[object, Mesh] = field(default_factory=dict)
    _rings: dict[object, RingTraffic] = field(default_factory=dict)
    _crossings: dict[tuple[int, int], Crossings] = field(default_factory=dict)
    """By micro-batch size and number of stages."""

    @cached_property
    def _ground(self) -> Ground:
        return Ground.of(self.problem)

    def mesh_of(self, choice: Choice) -> Mesh:
        key = (choice.num_replicas, choice.num_pipeline_ranks, choice.layout)
        if key not in self._meshes:
            self._meshes[key] = self._ground.mesh(*key)
        return self._meshes[key]

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
        key = (choice.micro_batch_size, choice.num_pipeline_ranks, choice.num_stages)
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

    def instance_in(
        self, choice: Choice, unit_bytes: int, stage_ranks: tuple[int, ...] | None = None
    ) -> Instance:
        """The same with units of so many bytes, its stages on these ranks (s mod P if absent)."""
        figures, mesh, ring = self.figures_of(choice), self.mesh_of(choice), self._ring_of(choice)
        tick = self._tick(choice)
        stage_ranks = stage_ranks or _stage_ranks(choice)
        links = [mesh.link(one, other) for one, other in itertools.pairwise(stage_ranks)]
        kinds = list(dict.fromkeys(links)) or [mesh.kinds[0].group_link]

        def hops(messages: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(_ticks(hop_seconds(messages, link), tick) for link in kinds)

        fixed = -(-fixed_bytes(figures, choice) // unit_bytes)
        return Instance(
            choice=choice,
            num_layers=figures.num_layers,
            tick_seconds=tick,
            unit_bytes=unit_bytes,
            pace=self._pace(choice, stage_ranks, kinds, tick),
            kinds=tuple(self._tables(choice, kind, stage_ranks, tick) for kind in mesh.kinds),
            rank_kinds=mesh.rank_kinds,
            hops=hops(ring.there),
            gradient_hops=hops(ring.back),
            hop_kinds=(0, *(kinds.index(link) for link in links)),
            memory=memory_tables(
                figures, self._crossings_of(choice), choice, self.problem, unit_bytes
            ),
            fixed_units=(fixed,) * choice.num_pipeline_ranks,
            limit_units=tuple(limit // unit_bytes for limit in mesh.limit_bytes),
        )

    def _tick(self, choice: Choice) -> float:
        """Seconds of a tick: a step of everything in sequence has at most HORIZON_TICKS."""
        mesh, figures = self.mesh_of(choice), self.figures_of(choice)
        whole = sum(parameters_of(figures, choice).weight_bytes)
        longest = 1e-12
        for kind in mesh.kinds:
            times = self._times_of(choice, kind.devices)
            compute = 2 * sum(times.forward) + sum(times.backward)
            moved = collectives(choice, kind.group_link, mesh.collectives)
            seconds = 2 * choice.num_micro_batches * compute + whole * (moved.gather + moved.reduce)
            longest = max(longest, seconds)
        return longest / HORIZON_TICKS

    def _pace(
        self, choice: Choice, stage_ranks: tuple[int, ...], links: Sequence[Link], tick: float
    ) -> Pace:
        figures, problem = self.figures_of(choice), self.problem
        kinds = self.mesh_of(choice).kinds
        devices = [device for kind in kinds for device in kind.devices]
        issue = min(device.instruction_overhead_seconds for device in devices)
        (tied_part,) = per_shard([figures.tied_bytes], choice)
        return Pace(
            stage_ranks=stage_ranks,
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
            offloads_inputs=choice.offload_inputs,
            loads=any(figures.layer_batch_bytes) and (issue > 0 or _slowest_host(devices) > 0),
            issue=round(issue / tick),
            tied_ranks=self._tied_ranks(figures, stage_ranks),
            tied=round(tied_seconds(figures, choice, links) / tick),
            tied_update=round(self._update_seconds(devices) * tied_part / tick),
        )

    def _tied_ranks(self, figures: Figures, stage_ranks: Sequence[int]) -> tuple[int, ...]:
        """Those that surely have tied weights, of several ranks: the first layer's, the last's."""
        tied, ends = figures.parameters.tied_trainable_bytes, {stage_ranks[0], stage_ranks[-1]}
        if len(set(stage_ranks)) == 1 or not (tied[0] and tied[-1]) or len(ends) == 1:
            return ()
        return tuple(sorted(ends))

    def _verdict_seconds(self, choice: Choice) -> float:
        """For all ranks to agree on a number: latencies alone, as there is next to nothing else."""
        cluster, size = self.problem.cluster, choice.num_replicas * choice.num_pipeline_ranks
        latencies = [cluster.hosts[0].link.latency_seconds]
        if size > cluster.hosts[0].num_devices:
            latencies = [cluster.network.latency_seconds]
        return 2 * num_rounds(size, cluster.collectives) * min(latencies)

    def _tables(
        self, choice: Choice, kind: RankKind, stage_ranks: Sequence[int], tick: float
    ) -> RankTables:
        figures, ring = self.figures_of(choice), self._ring_of(choice)
        times, parameters = self._times_of(choice, kind.devices), parameters_of(figures, choice)
        moved = collectives(choice, kind.group_link, self.mesh_of(choice).collectives)
        moments, shards = self._state_bytes(choice)

        def table(
            seconds: Iterable[float],
            *,
            entry: Sequence[float] | float = 0.0,
            leave: Sequence[float] | float = 0.0,
        ) -> Table:
            ends = (
                round(one / tick) if isinstance(one, float) else _ticks(one, tick)
                for one in (entry, leave)
            )
            return Table.of(_ticks(seconds, tick), entry=next(ends), leave=next(ends))

        def messages(numbers: Sequence[int], more: float = 0.0) -> list[float]:
            return [times.message * number + more for number in numbers]

        count = choice.num_micro_batches
        ahead = max(0, count - LOOKAHEAD - 1)
        host = _slowest_host(kind.devices)
        gather, gather_latency = moved.gather, moved.gather_latency
        if not choice.partition:  # the shard is all there is: a copy on the device
            gather, gather_latency = _each_byte(copy_seconds, kind.devices)
        ties_end = bool(self._tied_ranks(figures, stage_ranks))
        updates, least_update = self._updates(choice, kind.devices, ties_end=ties_end)
        read, _ = _each_byte(read_seconds, kind.devices)
        crossing = self._crossings_of(choice)
        return RankTables(
            forward=table(
                times.forward,
                entry=messages(ring.received, times.issue),
                leave=messages(ring.sent),
            ),
            backward=table(
                times.backward,
                entry=messages(ring.gradients_sent, times.issue),
                leave=messages(ring.gradients_received),
            ),
            gather=table(_scaled(gather, parameters.weight_bytes), entry=gather_latency),
            reduce=table(
                _scaled(moved.reduce, parameters.trainable_bytes), entry=moved.reduce_latency
            ),
            update=table(updates),
            least_update=round(least_update / tick),
            gather_updated=table(
                _scaled(moved.gather, parameters.trainable_bytes), entry=moved.gather_latency
            ),
            load=table(
                host * num_bytes + (times.issue if num_bytes else 0.0)
                for num_bytes in figures.layer_batch_bytes
            ),
            sending=table(
                [0.0] * figures.num_layers,
                entry=_scaled(ahead * times.issue, ring.received),
                leave=_scaled((count - 1) * times.issue, ring.sent),
            ),
            returning=table(
                [0.0] * figures.num_layers,
                entry=_scaled((count - 1) * times.issue, ring.gradients_sent),
                leave=_scaled(ahead * times.issue, ring.gradients_received),
            ),
            inputs=table(
                [0.0] * figures.num_layers,
                entry=_scaled(host, map(min, crossing.inputs, crossing.kept_inputs)),
            ),
            shard=table(_scaled(host, shards)),
            moments=table(_scaled(host, moments)),
            read=table(_scaled(read, reduced_bytes(parameters.trainable_bytes, choice))),
        )

    def _state_bytes(self, choice: Choice) -> tuple[list[int], list[int]]:
        """Per layer: moments, and the shard where weights are gathered for passes."""
        parameters = parameters_of(self.figures_of(choice), choice)
        shards = per_shard(parameters.trainable_bytes, choice)
        moments = [self.problem.optimizer_slots * num_bytes for num_bytes in shards]
        if not gathers_for_passes(choice.partition, offload_state=choice.offload_state):
            return moments, [0] * len(moments)
        return moments, per_shard(parameters.weight_bytes, choice)

    def _updates(
        self, choice: Choice, devices: Sequence[Device], *, ties_end: bool
    ) -> tuple[list[float], float]:
        """Seconds per layer, and the least that a stage's update takes: a kernel's overhead.

        With `ties_end`, tied weights are updated at the end of the step, and are left out.
        """
        parameters = parameters_of(self.figures_of(choice), choice)
        num_bytes, tied = parameters.trainable_bytes, parameters.tied_trainable_bytes
        if ties_end:
            num_bytes = tuple(whole - part for whole, part in zip(num_bytes, tied, strict=True))
        floor = max(update_seconds(0, device, self.problem.optimizer_slots) for device in devices)
        per_byte = self._update_seconds(devices)
        return _scaled(per_byte, per_shard(num_bytes, choice)), floor if all(num_bytes) else 0.0

    def _update_seconds(self, devices: Sequence[Device]) -> float:
        """Of a byte of parameters."""
        slots = self.problem.optimizer_slots

        def seconds(num_bytes: int, device: Device) -> float:
            return update_seconds(num_bytes, device, slots, element_bytes=1)

        return _each_byte(seconds, devices)[0]


def _stage_ranks(choice: Choice) -> tuple[int, ...]:
    """Stage s on pipeline rank s mod P."""
    return tuple(stage % choice.num_pipeline_ranks for stage in range(choice.num_stages))


def _slowest_host(devices: Sequence[Device]) -> float:
    """Seconds per byte between a device and its host's memory; 0 where copies are free."""
    rates = [device.host_bandwidth for device in devices if device.host_bandwidth is not None]
    return 1 / min(rates) if rates else 0.0


def _each_byte(
    seconds: Callable[[int, Device], float], devices: Sequence[Device]
) -> tuple[float, float]:
    """Seconds per byte and at least, on the slowest of the devices."""

    def on(device: Device) -> tuple[float, float]:
        return affine(lambda num_bytes: seconds(num_bytes, device))

    found = [on(device) for device in devices]
    return max(slope for slope, _ in found), max(rest for _, rest in found)


def _scaled(factor: float, counts: Iterable[int]) -> list[float]:
    return [factor * count for count in counts]


def _ticks(seconds: Iterable[float], tick: float) -> tuple[int, ...]:
    return tuple(round(value / tick) for value in seconds)
