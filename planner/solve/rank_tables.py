"""Ticks that stages take on one kind of pipeline rank, as tables over their cuts.

This module knows what each figure of a layer costs on a device and over a link. It does not know
which stages there are, nor when anything starts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from planner.cluster.types import CollectiveAlgorithm, Device
from planner.cost import copy_seconds, read_seconds, update_seconds
from planner.partitions import gathers_for_passes
from planner.solve.choices import Choice
from planner.solve.crossings import Crossings
from planner.solve.figures import Figures, LayerTimes, ParameterFigures
from planner.solve.instance import RankTables
from planner.solve.memory import parameters_of, per_shard, reduced_bytes
from planner.solve.mesh import RankKind
from planner.solve.problem import Problem
from planner.solve.step_parts import LOOKAHEAD
from planner.solve.tables import Table
from planner.solve.traffic import Collectives, RingTraffic, affine, collectives

__all__ = ["TableMaker", "slowest_host", "ticks_of", "update_byte_seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMaker:
    """Makes the tables of one choice on one kind of rank."""

    problem: Problem
    choice: Choice
    figures: Figures
    times: LayerTimes
    """On the devices of the rank."""
    ring: RingTraffic
    crossings: Crossings
    kind: RankKind
    algorithm: CollectiveAlgorithm
    tick_seconds: float
    ties_end: bool
    """Tied weights are updated at the end of the step, and are no stage's to update."""

    def tables(self) -> RankTables:
        """All of them."""
        host, none = slowest_host(self.kind.devices), [0.0] * self.figures.num_layers
        inputs = map(min, self.crossings.inputs, self.crossings.kept_inputs)
        moments, shards = self._state_bytes()
        read, _ = _each_byte(read_seconds, self.kind.devices)
        reduced = reduced_bytes(self._parameters.trainable_bytes, self.choice)
        moved = collectives(self.choice, self.kind, self.algorithm)
        gather, reduce, gather_updated = self._data_tables(moved)
        updates, least_update = self._updates()
        forward, again, backward = self._compute_tables()
        sending, returning = self._issue_tables()
        return RankTables(
            forward=forward,
            again=again,
            backward=backward,
            gather=gather,
            reduce=reduce,
            update=self._table(updates),
            least_update=round(least_update / self.tick_seconds),
            gather_updated=gather_updated,
            load=self._load_table(host),
            sending=sending,
            returning=returning,
            inputs=self._table(none, entry=_scaled(host, inputs)),
            shard=self._table(_scaled(host, shards)),
            moments=self._table(_scaled(host, moments)),
            read=self._table(_scaled(read, reduced)),
        )

    @property
    def _parameters(self) -> ParameterFigures:
        return parameters_of(self.figures, self.choice)

    def _table(
        self,
        seconds: Iterable[float],
        *,
        entry: Sequence[float] | float = 0.0,
        leave: Sequence[float] | float = 0.0,
    ) -> Table:
        tick = self.tick_seconds
        ends = (
            round(one / tick) if isinstance(one, float) else ticks_of(one, tick)
            for one in (entry, leave)
        )
        return Table.of(ticks_of(seconds, tick), entry=next(ends), leave=next(ends))

    def _compute_tables(self) -> tuple[Table, Table, Table]:
        """Forward and backward, with the messages at both ends, and forward again without any."""
        times, ring = self.times, self.ring

        def messages(numbers: Sequence[int], more: float = 0.0) -> list[float]:
            return [times.message * number + more for number in numbers]

        return (
            self._table(
                times.forward,
                entry=messages(ring.received, times.issue),
                leave=messages(ring.sent),
            ),
            self._table(times.again, entry=times.issue),
            self._table(
                times.backward,
                entry=messages(ring.gradients_sent, times.issue),
                leave=messages(ring.gradients_received),
            ),
        )

    def _data_tables(self, moved: Collectives) -> tuple[Table, Table, Table]:
        """Gathers, reductions, and gathers of updated weights."""
        parameters = self._parameters
        gather, gather_latency = moved.gather, moved.gather_latency
        if not self.choice.partition:  # the shard is all there is: a copy on the device
            gather, gather_latency = _each_byte(copy_seconds, self.kind.devices)
        return (
            self._table(_scaled(gather, parameters.weight_bytes), entry=gather_latency),
            self._table(
                _scaled(moved.reduce, parameters.trainable_bytes), entry=moved.reduce_latency
            ),
            self._table(
                _scaled(moved.gather, parameters.updated_bytes), entry=moved.gather_latency
            ),
        )

    def _load_table(self, host: float) -> Table:
        """Of batch keys, `host` seconds a byte."""
        return self._table(
            host * num_bytes + (self.times.issue if num_bytes else 0.0)
            for num_bytes in self.figures.layer_batch_bytes
        )

    def _issue_tables(self) -> tuple[Table, Table]:
        """Host time of transfers, of all micro-batches but those that are issued ahead."""
        count, ring, issue = self.choice.num_micro_batches, self.ring, self.times.issue
        ahead, none = max(0, count - LOOKAHEAD - 1), [0.0] * self.figures.num_layers
        return (
            self._table(
                none,
                entry=_scaled(ahead * issue, ring.received),
                leave=_scaled((count - 1) * issue, ring.sent),
            ),
            self._table(
                none,
                entry=_scaled((count - 1) * issue, ring.gradients_sent),
                leave=_scaled(ahead * issue, ring.gradients_received),
            ),
        )

    def _state_bytes(self) -> tuple[list[int], list[int]]:
        """Per layer: moments, or the gradients that go down to updates on the host; and the shard
        where weights are gathered for passes."""
        choice, parameters = self.choice, self._parameters
        shards = per_shard(parameters.trainable_bytes, choice)
        moments = [self.problem.optimizer_slots * num_bytes for num_bytes in shards]
        if self.problem.updates_on_host:
            moments = reduced_bytes(parameters.trainable_bytes, choice)
        if not gathers_for_passes(choice.partition, offload_state=choice.offload_state):
            return moments, [0] * len(moments)
        return moments, per_shard(parameters.shard_bytes, choice)

    def _updates(self) -> tuple[list[float], float]:
        """Seconds per layer, and the least that a stage's update takes: a kernel's overhead."""
        parameters, slots = self._parameters, self.problem.optimizer_slots
        num_bytes, tied = parameters.trainable_bytes, parameters.tied_trainable_bytes
        if self.ties_end:
            num_bytes = tuple(whole - part for whole, part in zip(num_bytes, tied, strict=True))
        floor = max(update_seconds(0, device, slots) for device in self.kind.updaters)
        per_byte = update_byte_seconds(self.kind.updaters, slots)
        parts = per_shard(num_bytes, self.choice)
        return _scaled(per_byte, parts), floor if all(num_bytes) else 0.0


def update_byte_seconds(devices: Sequence[Device], optimizer_slots: int) -> float:
    """Seconds of an update for each byte of parameters, on the slowest of the devices."""

    def seconds(num_bytes: int, device: Device) -> float:
        return update_seconds(num_bytes, device, optimizer_slots, element_bytes=1)

    return _each_byte(seconds, devices)[0]


def slowest_host(devices: Sequence[Device]) -> float:
    """Seconds per byte between a device and its host's memory; 0 where copies are free."""
    rates = [device.host_bandwidth for device in devices if device.host_bandwidth is not None]
    return 1 / min(rates) if rates else 0.0


def ticks_of(seconds: Iterable[float], tick_seconds: float) -> tuple[int, ...]:
    """Rounded to whole ticks."""
    return tuple(round(value / tick_seconds) for value in seconds)


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
