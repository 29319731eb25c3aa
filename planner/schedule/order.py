"""The layered order: which compute each pipeline rank does, and in which sequence.

Forward: its stages ascending, and within a stage all micro-batches ascending. Backward: its stages
descending, and within a stage all micro-batches **ascending**, the order in which plain
accumulation adds gradients. So a rank finishes the backward pass of all micro-batches through a
stage before it starts any preceding one (arXiv 2106.02679; US12585929B2, claim on layer order).

This module knows stages and ranks. It does not know costs, buffers or transfers.
"""

from dataclasses import dataclass

from planner.plan.types import Opcode
from planner.solve.types import Placement

__all__ = ["ComputeStep", "Order", "layered_order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeStep:
    """One compute instruction before its buffers are known."""

    opcode: Opcode
    """FORWARD, RECOMPUTE or BACKWARD."""
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The compute steps of every pipeline rank."""

    ranks: tuple[tuple[ComputeStep, ...], ...]


def layered_order(placement: Placement) -> Order:
    """The layered order of a placement; RECOMPUTE stands right before its BACKWARD."""
    return Order(
        ranks=tuple(_rank_order(placement, rank) for rank in range(placement.num_pipeline_ranks))
    )


def _rank_order(placement: Placement, rank: int) -> tuple[ComputeStep, ...]:
    stages = [stage for stage, owner in enumerate(placement.stage_ranks) if owner == rank]
    micro_batches = range(placement.num_micro_batches)
    steps = [
        ComputeStep(opcode=Opcode.FORWARD, stage=stage, micro_batch=micro_batch)
        for stage in stages
        for micro_batch in micro_batches
    ]
    for stage in reversed(stages):
        for micro_batch in micro_batches:
            if placement.recompute[stage]:
                steps.append(
                    ComputeStep(opcode=Opcode.RECOMPUTE, stage=stage, micro_batch=micro_batch)
                )
            steps.append(ComputeStep(opcode=Opcode.BACKWARD, stage=stage, micro_batch=micro_batch))
    return tuple(steps)
