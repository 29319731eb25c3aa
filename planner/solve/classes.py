"""A pipeline rank's bytes class by class, at the worst moment of the memory model.

This module knows what the tables mean. It does not know limits.
"""

from planner.solve.instance import Instance
from planner.solve.moments import peaks
from planner.solve.tables import Table
from planner.solve.types import Split

__all__ = ["bytes_by_class"]


def bytes_by_class(instance: Instance, split: Split, rank: int) -> dict[str, int]:
    """Bytes of one pipeline rank under a split; they add up to its peak."""
    memory, unit, own = instance.memory, instance.unit_bytes, instance.pace.own[rank]

    def read(table: Table, stage: int) -> int:
        return unit * table.at(split.boundaries[stage], split.boundaries[stage + 1])

    def either(tables: tuple[Table, Table], stage: int) -> int:
        return read(tables[split.recompute[stage]], stage)

    def size(table: Table) -> list[int]:
        return [read(table, stage) for stage in own]

    (whole,) = peaks(memory, [own], read, either, max)
    fixed = unit * instance.fixed_units[rank]
    gather = memory.num_gather_buffers * max(size(memory.gather))
    number, sums = memory.num_sum_buffers, size(memory.sums)[::-1]
    gradients = number * max(sums)
    if memory.alternates:
        gradients = sum(max(sums[turn::number]) for turn in range(min(number, len(sums))))
    state, stored = sum(size(memory.state)), [either(memory.stored, stage) for stage in own]
    rest = whole - state - gather - gradients
    activations = min(rest, sum(stored))
    return {
        "state": state,
        "gather buffers": gather,
        "gradient buffers": gradients,
        "activations": activations,
        "transient": rest - activations + fixed,
    }
