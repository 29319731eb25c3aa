"""Orders that pass all micro-batches through a stage before the next, and plain accumulation.

Layered: a rank finishes the backward pass of all micro-batches through a stage before it starts
any preceding one (arXiv 2106.02679; US12585929B2, claim on layer order). In every order of this
package a stage's backward takes micro-batches **ascending**, the order in which plain accumulation
adds gradients.
"""

from planner.schedule.order import (
    ComputeStep,
    Order,
    backward_steps,
    forward_step,
    local_stages,
    require_one_stage,
)
from planner.solve.types import Placement

__all__ = ["forward_order", "gpipe_order", "layered_order", "plain_order"]


def layered_order(placement: Placement) -> Order:
    """Forward through the rank's stages ascending, then backward through them descending."""
    ranks = []
    for stages in local_stages(placement):
        steps = _forward(placement, stages)
        for stage in reversed(stages):
            steps += backward_steps(placement, stage, range(placement.num_micro_batches))
        ranks.append(tuple(steps))
    return Order(ranks=tuple(ranks))


def gpipe_order(placement: Placement) -> Order:
    """All forwards, then all backwards, with one stage per rank (Huang et al., NeurIPS 2019).

    That is the layered order of such a placement. (The paper goes backward through the
    micro-batches in reverse, which takes as long.)

    Raises:
        UsageError: a rank has no stage, or several.
    """
    require_one_stage(placement)
    return layered_order(placement)


def forward_order(placement: Placement) -> Order:
    """The forward half of the layered order."""
    return Order(ranks=tuple(tuple(_forward(placement, s)) for s in local_stages(placement)))


def plain_order(placement: Placement) -> Order:
    """Each micro-batch through all stages of the rank and back before the next one starts."""
    ranks = []
    for stages in local_stages(placement):
        steps: list[ComputeStep] = []
        for micro_batch in range(placement.num_micro_batches):
            steps += [forward_step(stage, micro_batch) for stage in stages]
            for stage in reversed(stages):
                steps += backward_steps(placement, stage, (micro_batch,))
        ranks.append(tuple(steps))
    return Order(ranks=tuple(ranks))


def _forward(placement: Placement, stages: list[int]) -> list[ComputeStep]:
    return [
        forward_step(stage, micro_batch)
        for stage in stages
        for micro_batch in range(placement.num_micro_batches)
    ]
