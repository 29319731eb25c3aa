"""Every measurement of a cluster, in order: which ranks, which sizes, one thing at a time.

All ranks go through the same list together; what each of them saw is collected at the end. Knows
which ranks share a host. Does not know how an operation is timed, nor what the figures are for.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from planner.cluster.samples import OverlapSpec, SampleSpec
from planner.plan.types import Plan
from runtime.exchange import ExchangeTransport
from runtime.probe import SMALL_BYTES, Beside, Probe, message_sizes, spread_of, wait_for_all
from runtime.probe_plan import probe_plan
from runtime.transfer import DistributedTransport

__all__ = ["Found", "Survey", "collective_layouts", "pairs_to_time", "survey"]

COLLECTIVES = ("gather", "reduce-scatter", "all-reduce")
_MAX_PAIRS = 8
_NUM_COLLECTIVE_SIZES = 3
_Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """What one rank saw of one operation."""

    operation: str
    where: str
    num_ranks: int
    num_bytes: int
    seconds: tuple[float, ...] = ()
    beside: Beside | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.operation, self.where, self.num_ranks, self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What all ranks saw."""

    samples: list[SampleSpec]
    overlaps: list[OverlapSpec]
    message_seconds: float
    """Processor time of each end of a small message."""


@dataclass(slots=True, kw_only=True)
class Survey:
    """One rank's part."""

    rank: int
    hosts: Sequence[range]
    """World ranks of each host."""
    backend: str
    device: torch.device
    deadline_seconds: float
    largest_bytes: int
    say: Callable[[str], None]
    """Progress, on one rank."""
    _raw: list[_Raw] = field(default_factory=list)
    _end_seconds: list[float] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return self.hosts[-1].stop

    def measure_pairs(self) -> None:
        """Messages between two ranks: alone, both directions at once, beside compute, and all."""
        inside, between = pairs_to_time(self.hosts)
        rings = [list(host) for host in self.hosts if len(host) > 2]
        crossing = list(zip(*self.hosts[:2], strict=False)) if len(self.hosts) > 1 else []
        wanted = [*inside, *between, *crossing]
        wanted += [pair for ring in rings for pair in zip(ring, ring[1:] + ring[:1], strict=True)]
        if not wanted:
            return
        plan = self._plan(self.world_size, 1, [(min(pair), max(pair)) for pair in wanted])
        with _Opened(plan, self.rank, self.device) as probe:
            for where, pairs in (("inside", inside), ("between", between)):
                for pair in pairs:
                    self.say(f"messages between ranks {pair[0]} and {pair[1]}, {where} hosts")
                    self._measure_pair(probe, where, pair)
            for ring in rings:
                self._crowd(probe, "inside", len(ring), _ring_peers(ring, self.rank))
            if len(crossing) > 1:
                self._crowd(probe, "between", 2 * len(crossing), _peers(crossing, self.rank))

    def measure_collectives(self) -> None:
        """Collectives over the ranks of a host, and over all ranks where there are more hosts."""
        for where, num_replicas in collective_layouts(self.hosts):
            self.say(f"collectives over {num_replicas} ranks, {where} hosts")
            plan = self._plan(self.world_size // num_replicas, num_replicas)
            with _Opened(plan, self.rank, self.device) as probe:
                sizes = message_sizes(self.largest_bytes)[-_NUM_COLLECTIVE_SIZES:]
                for operation in COLLECTIVES:
                    for size in (size // (4 * num_replicas) * 4 * num_replicas for size in sizes):
                        if size:
                            seconds = probe.collective(operation, num_replicas, size)
                            self._note(operation, where, num_replicas, size, seconds)
                largest = sizes[-1] // (4 * num_replicas) * 4 * num_replicas
                for operation in COLLECTIVES[:2] if largest else ():
                    beside = probe.collective_beside(operation, num_replicas, largest)
                    self._note(operation, where, num_replicas, largest, beside=beside)

    def collect(self) -> Found:
        """What all ranks saw; every rank gets it."""
        everyone: list[tuple[list[_Raw], list[float]]] = [([], [])] * self.world_size
        dist.all_gather_object(everyone, (self._raw, self._end_seconds))
        raw = [item for items, _ in everyone for item in items]
        ends = [seconds for _, found in everyone for seconds in found]
        return Found(
            samples=_samples(raw),
            overlaps=_overlaps(raw),
            message_seconds=statistics.median(ends) if ends else 0.0,
        )

    def _measure_pair(self, probe: Probe, where: str, pair: _Pair) -> None:
        for source, destination in (pair, pair[::-1]):
            self._wait()
            answer_seconds = 0.0
            for size in message_sizes(self.largest_bytes):
                seconds = probe.one_way(source, destination, size)
                if not seconds:
                    continue
                if size == SMALL_BYTES:
                    answer_seconds = statistics.median(seconds) / 2
                # The answer takes as long as any message of its size.
                one_way = [max(whole - answer_seconds, whole / 2) for whole in seconds]
                self._note("send", where, 2, size, one_way)
        peers = _peers([pair], self.rank)
        if self.device.type == "cpu":  # elsewhere a copy engine moves the bytes
            self._wait()
            end_seconds = probe.end_seconds(*pair)
            self._end_seconds += [] if end_seconds is None else [end_seconds]
        self._wait()
        largest = message_sizes(self.largest_bytes)[-1]
        self._note("exchange", where, 2, largest, probe.exchange(peers, largest))
        self._wait()
        self._note("exchange", where, 2, largest, beside=probe.exchange_beside(peers, largest))

    def _crowd(self, probe: Probe, where: str, num_ranks: int, peers: _Pair | None) -> None:
        """An exchange by all ranks at once."""
        self._wait()
        largest = message_sizes(self.largest_bytes)[-1]
        self._note("crowd", where, num_ranks, largest, probe.exchange(peers, largest))

    def _note(
        self,
        operation: str,
        where: str,
        num_ranks: int,
        num_bytes: int,
        seconds: Iterable[float] = (),
        *,
        beside: Beside | None = None,
    ) -> None:
        raw = _Raw(
            operation=operation,
            where=where,
            num_ranks=num_ranks,
            num_bytes=num_bytes,
            seconds=tuple(seconds),
            beside=beside,
        )
        if raw.seconds or beside is not None:
            self._raw.append(raw)

    def _plan(
        self, num_pipeline_ranks: int, num_replicas: int, pairs: Iterable[_Pair] = ()
    ) -> Plan:
        return probe_plan(
            num_pipeline_ranks, num_replicas, self.backend, self.deadline_seconds, pairs
        )

    def _wait(self) -> None:
        wait_for_all(self.device)


def survey(whole: Survey) -> Found:
    """Measure everything; every rank gets what all saw."""
    whole.measure_pairs()
    whole.measure_collectives()
    return whole.collect()


def pairs_to_time(hosts: Sequence[range]) -> tuple[list[_Pair], list[_Pair]]:
    """Neighbours inside hosts, and first ranks of neighbouring hosts: at most eight of each."""
    inside = [pair for host in hosts for pair in pairwise(host)]
    firsts = [host.start for host in hosts]
    between = list(pairwise(firsts))
    return _some(inside), _some(between)


def collective_layouts(hosts: Sequence[range]) -> list[tuple[str, int]]:
    """(where, members) of the collectives to time: all ranks in consecutive groups of that size.

    Inside: the largest groups of one size, at least two ranks, that cross no host's border.
    """
    world_size = hosts[-1].stop
    borders = [host.start for host in hosts]
    sizes = [size for size in range(2, world_size + 1) if world_size % size == 0]
    inside = [size for size in sizes if all(border % size == 0 for border in borders)]
    found = [("inside", max(inside))] if inside else []
    return [*found, ("between", world_size)] if len(hosts) > 1 else found


class _Opened:
    """A transport and its probe, ready on all ranks at once; its threads end with the block.

    The process groups stay until the job ends: taking one down would wait for the others.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        self._transport = DistributedTransport(plan, rank, device)
        self._rank, self._device = rank, device

    def __enter__(self) -> Probe:
        wait_for_all(self._device)
        return Probe(self._transport, self._rank, self._device)

    def __exit__(self, *_: object) -> None:
        ExchangeTransport.close(self._transport)


def _some(pairs: Sequence[_Pair]) -> list[_Pair]:
    step = max(1, -(-len(pairs) // _MAX_PAIRS))
    return list(pairs[::step])


def _peers(pairs: Sequence[_Pair], rank: int) -> _Pair | None:
    """(rank to send to, rank to receive from) where each pair sends both ways."""
    for a, b in pairs:
        if rank in (a, b):
            other = b if rank == a else a
            return other, other
    return None


def _ring_peers(ring: Sequence[int], rank: int) -> _Pair | None:
    if rank not in ring:
        return None
    place = ring.index(rank)
    return ring[(place + 1) % len(ring)], ring[place - 1]


def _samples(raw: Sequence[_Raw]) -> list[SampleSpec]:
    """Medians over all ranks and repetitions."""
    by_key: dict[tuple[str, str, int, int], list[float]] = {}
    for item in raw:
        if item.seconds:
            by_key.setdefault(item.key, []).extend(item.seconds)
    return [
        SampleSpec.model_validate(
            {
                "operation": operation,
                "where": where,
                "ranks": num_ranks,
                "bytes": num_bytes,
                "seconds": float(f"{statistics.median(seconds):.4g}"),
                "spread": float(f"{spread_of(seconds):.2g}"),
            }
        )
        for (operation, where, num_ranks, num_bytes), seconds in by_key.items()
    ]


def _overlaps(raw: Sequence[_Raw]) -> list[OverlapSpec]:
    """Medians over all ranks."""
    by_key: dict[tuple[str, str, int, int], list[Beside]] = {}
    for item in raw:
        if item.beside is not None:
            by_key.setdefault(item.key, []).append(item.beside)
    return [
        OverlapSpec.model_validate(
            {
                "operation": operation,
                "where": where,
                "ranks": num_ranks,
                "bytes": num_bytes,
                "hidden": float(f"{statistics.median(b.hidden for b in found):.2g}"),
                "slowdown": float(f"{statistics.median(b.slowdown for b in found):.2g}"),
            }
        )
        for (operation, where, num_ranks, num_bytes), found in by_key.items()
    ]
