"""What operations hold, in few units: the less a number can be, the faster CP-SAT is.

Only what is surely held counts: between a micro-batch's forward and its backward what the stage
keeps, and while one of them runs what it reads and makes. The simulator, which looks at transfers
under way too, finds at least as much. This module knows plans and buffers. It does not know time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.plan.types import Plan, StagePlan
from planner.simulate.memory import resident_memory
from planner.solve.types import Placement

__all__ = ["Units", "units_of"]

UNITS = 256
"""That the largest thing held takes, where sizes have no common measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The fields of Operations."""

    held: tuple[int, ...]
    forward_extra: tuple[int, ...]
    backward_extra: tuple[int, ...]
    capacity: tuple[int, ...]
    unit_bytes: int


def units_of(plan: Plan, placement: Placement, limit_bytes: Sequence[int]) -> Units:
    """Of a placement's plan. What every operation of a rank takes beside what is held comes off the
    rank's capacity, and sizes are rounded down."""
    memory = [_memory(plan, placement, stage) for stage in plan.stages]
    most = max(held for held, _, _ in memory)
    unit = math.gcd(*(held for held, _, _ in memory))
    if unit * UNITS < most:
        unit = most // UNITS
    unit = max(1, unit)
    always = [
        min(min(extra) for (_, *extra), own in zip(memory, placement.stage_ranks, strict=True)
            if own == rank)
        for rank in range(placement.num_pipeline_ranks)
    ]  # fmt: skip
    beyond = [always[rank] for rank in placement.stage_ranks]
    free = [
        limit - resident_memory(plan, rank).total_bytes - always[rank]
        for rank, limit in enumerate(limit_bytes)
    ]
    pairs = list(zip(memory, beyond, strict=True))
    return Units(
        held=tuple(held // unit for held, _, _ in memory),
        forward_extra=tuple((extra - less) // unit for (_, extra, _), less in pairs),
        backward_extra=tuple((extra - less) // unit for (_, _, extra), less in pairs),
        capacity=tuple(max(0, number) // unit for number in free),
        unit_bytes=unit,
    )


def _memory(plan: Plan, placement: Placement, stage: StagePlan) -> tuple[int, int, int]:
    """Bytes of one micro-batch of a stage: held from forward to backward, and beyond that while
    forward or backward runs. A tensor that several stages of a rank keep counts for the first.
    """
    sizes = {buffer.name: buffer.num_bytes for buffer in plan.buffers[stage.rank]}
    own = [other for other in plan.stages if other.rank == stage.rank]
    kept_before = set[str]().union(
        *(_kept(other, placement) for other in own if other.index < stage.index)
    )
    kept_by_all = set[str]().union(*(_kept(other, placement) for other in own))
    kept = _kept(stage, placement) - kept_before
    saved = stage.saved_bytes
    held = sum(sizes.get(name, 0) for name in kept) + (0 if stage.recompute else saved)
    outputs = {name for name in stage.outputs if name != "loss"}
    made = sum(sizes.get(name, 0) for name in outputs)
    forward_extra = max(made, stage.forward_transient_bytes)
    forward_extra -= sum(sizes.get(name, 0) for name in outputs & kept)
    forward_extra += sum(sizes.get(name, 0) for name in {*stage.inputs} - kept_by_all)
    new, read = _gradients(plan, stage)
    backward_extra = max(sum(sizes.get(n, 0) for n in new), stage.backward_transient_bytes)
    backward_extra += sum(sizes.get(name, 0) for name in read)
    if stage.recompute:
        backward_extra = saved + max(backward_extra, stage.recompute_transient_bytes)
    return held, max(0, forward_extra), backward_extra


def _kept(stage: StagePlan, placement: Placement) -> set[str]:
    """Boundary tensors and batch keys that are on the rank until the stage's backward has run."""
    names = set(stage.kept)
    if stage.recompute:
        names = (names - set(stage.outputs)) | {*stage.inputs, *stage.batch_keys}
    if placement.offload_inputs:
        names = set()
    keys = set(stage.batch_keys)
    return {f"batch:{name}" if name in keys else name for name in names}


def _gradients(plan: Plan, stage: StagePlan) -> tuple[list[str], list[str]]:
    """Buffers of gradients that the backward of a stage makes, and those that it finds."""
    trained = {tensor.name for tensor in plan.tensors if tensor.requires_grad}
    later = {n for other in plan.stages if other.index > stage.index for n in other.inputs}
    back = [name for name in stage.inputs if name in trained]
    passed = [name for name in back if name in later]
    made = [name for name in stage.outputs if name in trained]
    new = [name for name in back if name not in later]
    return (
        [f"gradient:{name}" for name in new],
        [f"gradient:{name}" for name in (*made, *passed)],
    )
