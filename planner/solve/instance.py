"""One split problem in whole numbers: everything that depends on where the cuts lie.

Times are counted in ticks and memory in units, so that the dynamic programme, the local search,
CP-SAT and a brute force agree to the last digit. What a stage takes is read off tables over cuts,
which differ with the kind of devices that its rank has.
This module knows the tables and how they are read. It does not know where the figures come from.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import mul

import numpy as np
from numpy.typing import NDArray

from planner.solve.choices import Choice
from planner.solve.moments import MemoryTables, peaks
from planner.solve.pace import step_time
from planner.solve.step_parts import STAGE_COLUMNS, Pace, StageTicks, Ticks
from planner.solve.tables import Cuts, Table, least
from planner.solve.types import Split

__all__ = [
    "Cuts", "Flags", "Instance", "RankTables", "latest_of_many", "overflow_units", "rank_units",
    "rank_units_of_many", "stage_ticks", "stages_of", "stages_of_many", "step_ticks",
    "step_ticks_of_many",
]  # fmt: skip

Flags = NDArray[np.bool_]

FEW_STAGES = 24
"""Up to so many, numbers one by one are faster than arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTables:
    """Ticks that stages take on one kind of pipeline rank."""

    forward: Table
    """One micro-batch, with the messages at both ends."""
    again: Table
    """One micro-batch forward again, before its backward."""
    backward: Table
    """As forward."""
    gather: Table
    """Of the weights before a pass; nothing where they stay in place."""
    reduce: Table
    update: Table
    least_update: int
    """A stage's update takes so long at least."""
    gather_updated: Table
    load: Table
    """One micro-batch's batch keys, from the host."""
    sending: Table
    """Host time between forwards, of all micro-batches, to issue transfers."""
    returning: Table
    inputs: Table
    """One micro-batch's stored inputs, to the host or back."""
    shard: Table
    """Weights between the host and the device."""
    moments: Table
    read: Table
    """The gradients, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The tables of one choice."""

    choice: Choice
    num_layers: int
    tick_seconds: float
    unit_bytes: int
    pace: Pace
    kinds: tuple[RankTables, ...]
    rank_kinds: tuple[int, ...]
    """Index into kinds of each pipeline rank."""
    hops: tuple[tuple[int, ...], ...]
    """Per kind of link and cut: ticks to send one micro-batch's tensors."""
    gradient_hops: tuple[tuple[int, ...], ...]
    """The same for the gradients on their way back."""
    hop_kinds: tuple[int, ...]
    """Per stage: kind of the link over which it receives from the stage before."""
    memory: MemoryTables
    fixed_units: tuple[int, ...]
    """Per pipeline rank: whatever the cuts do not change."""
    limit_units: tuple[int, ...]
    """Per pipeline rank."""
    tables: tuple[RankTables, ...] = field(init=False)
    """Per stage."""
    again: tuple[int, ...] = field(init=False)
    """Prefix sum: ticks of one micro-batch's second forward on the fastest kind of rank."""
    time: tuple[int, ...] = field(init=False)
    """Prefix sum: ticks of one micro-batch in both directions on the fastest kind of rank, with a
    second forward where every stage has one."""

    def __post_init__(self) -> None:
        # Made once: the local search asks for them with every split it tries.
        kinds = [self.kinds[self.rank_kinds[rank]] for rank in self.pace.stage_ranks]
        object.__setattr__(self, "tables", tuple(kinds))
        again = least([kind.again for kind in self.kinds]).prefix
        ways = [[kind.forward for kind in self.kinds], [kind.backward for kind in self.kinds]]
        parts = [least(tables).prefix for tables in ways] + [again] * bool(self.choice.recompute)
        object.__setattr__(self, "again", again)
        object.__setattr__(self, "time", tuple(map(sum, zip(*parts, strict=True))))

    @property
    def kept(self) -> tuple[int, ...]:
        """Prefix sum: units that stay on a rank through forward."""
        stored = self.memory.stored[bool(self.choice.recompute)]
        return tuple(map(sum, zip(self.memory.state.prefix, stored.prefix, strict=True)))

    @property
    def buffer(self) -> tuple[int, ...]:
        """Prefix sum: units of gather and gradient buffers; the largest stage of a rank counts."""
        return tuple(map(sum, zip(self.memory.gather.prefix, self.memory.sums.prefix, strict=True)))


def stages_of(
    instance: Instance,
    column: Callable[[str], Sequence[Ticks]],
    again: Sequence[Ticks],
    hop: Callable[[Sequence[int], int], Ticks],
    at_least: Callable[[Ticks, int], Ticks],
) -> list[StageTicks]:
    """What each stage takes.

    Args:
        column: the name of one of a rank's tables -> what it says of each stage.
        again: per stage, 1 where it is recomputed.
        hop: a table over cuts and a stage -> its entry at the stage's first cut.
    """
    pace, nothing = instance.pace, (0,) * len(again)
    forward, zero = column("forward"), [0]
    columns = {name: column(name) if name in pace.used else nothing for name in STAGE_COLUMNS}
    if any(tables.least_update for tables in instance.kinds):
        columns["update"] = [
            at_least(update, tables.least_update)
            for update, tables in zip(columns["update"], instance.tables, strict=True)
        ]
    kinds = list(enumerate(instance.hop_kinds))[1:]
    rows = zip(
        forward,
        map(mul, column("again"), again),
        column("backward"),
        zero + [hop(instance.hops[kind], stage) for stage, kind in kinds],
        zero + [hop(instance.gradient_hops[kind], stage) for stage, kind in kinds],
        *columns.values(),
        strict=True,
    )
    return [StageTicks(*row) for row in rows]


def stage_ticks(instance: Instance, split: Split) -> list[StageTicks]:
    """What each stage of a split takes."""
    cuts, pairs = split.boundaries, list(itertools.pairwise(split.boundaries))

    def column(name: str) -> list[int]:
        if len(instance.kinds) > 1:
            tables = zip(instance.tables, pairs, strict=True)
            return [getattr(kind, name).at(first, end) for kind, (first, end) in tables]
        table: Table = getattr(instance.kinds[0], name)
        begins, ends = table.begins, table.ends
        return [begins[first] + ends[end] for first, end in pairs]

    def hop(table: Sequence[int], stage: int) -> int:
        return table[cuts[stage]]

    return stages_of(instance, column, split.recompute, hop, max)


def step_ticks(instance: Instance, split: Split) -> int:
    """The step-time model's answer for a split (see `planner.solve.pace`)."""
    ticks: int = step_time(stage_ticks(instance, split), instance.pace, max)
    return ticks


def step_ticks_of_many(instance: Instance, cuts: Cuts, recompute: Flags) -> Cuts:
    """The same for many splits, a row of boundaries and one of flags each."""
    found = step_time(stages_of_many(instance, cuts, recompute), instance.pace, latest_of_many)
    many: Cuts = np.broadcast_to(found, len(cuts))
    return many


def stages_of_many(instance: Instance, cuts: Cuts, recompute: Flags) -> list[StageTicks]:
    """What each stage takes in each of many splits."""

    def column(name: str) -> list[Cuts]:
        found = [getattr(kind, name).of_all(cuts) for kind in instance.kinds]
        kinds = (instance.rank_kinds[rank] for rank in instance.pace.stage_ranks)
        return [found[kind][:, stage] for stage, kind in enumerate(kinds)]

    def hop(table: Sequence[int], stage: int) -> Cuts:
        return np.array(table, dtype=np.int64)[cuts[:, stage]]

    return stages_of(instance, column, list(recompute.T), hop, np.maximum)


def latest_of_many(*moments: Ticks) -> Ticks:
    """The latest of some moments, in each of many splits."""
    latest = moments[0]
    for moment in moments[1:]:
        latest = np.maximum(latest, moment)
    return latest


def rank_units(instance: Instance, split: Split) -> list[int]:
    """Peak memory of each pipeline rank in units, by the memory model."""
    boundaries, recompute = split.boundaries, split.recompute
    if len(recompute) > FEW_STAGES and instance.pace.is_modular:
        rows = rank_units_of_many(instance, np.array([boundaries]), np.array([recompute]))
        units: list[int] = rows[0].tolist()
        return units

    def read(table: Table, stage: int) -> int:
        return table.begins[boundaries[stage]] + table.ends[boundaries[stage + 1]]

    def either(tables: tuple[Table, Table], stage: int) -> int:
        return read(tables[recompute[stage]], stage)

    found = peaks(instance.memory, instance.pace.own, read, either, max)
    return [fixed + peak for fixed, peak in zip(instance.fixed_units, found, strict=True)]


def rank_units_of_many(instance: Instance, cuts: Cuts, recompute: Flags) -> Cuts:
    """The same for many splits: a row of ranks for each."""
    pace, known = instance.pace, dict[int, Cuts]()
    # All ranks at once where they have as many stages each, else one after the other.
    places = [slice(stage, stage + 1) for stage in range(len(pace.stage_ranks))]
    ranks: Sequence[Sequence[int]] = pace.own
    if pace.is_modular:
        starts = range(0, len(pace.stage_ranks), pace.num_ranks)
        places = [slice(start, start + pace.num_ranks) for start in starts]
        ranks = [range(len(places))]

    def read(table: Table, place: int) -> Cuts:
        if id(table) not in known:
            known[id(table)] = table.of_all(cuts)
        return known[id(table)][:, places[place]]

    def either(tables: tuple[Table, Table], place: int) -> Cuts:
        plain, again = (read(table, place) for table in tables)
        return np.where(recompute[:, places[place]], again, plain)

    found = peaks(instance.memory, ranks, read, either, latest_of_many)
    units: Cuts = np.concatenate(found, axis=1) + np.array(instance.fixed_units)
    return units


def overflow_units(instance: Instance, split: Split) -> tuple[int, int]:
    """Largest and summed excess over the ranks' limits; (0, 0) where all fit."""
    excess = [
        max(0, units - limit)
        for units, limit in zip(rank_units(instance, split), instance.limit_units, strict=True)
    ]
    return max(excess), sum(excess)
