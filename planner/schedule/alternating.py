"""Orders that alternate forward and backward once the pipeline is warm, to hold less memory.

1F1B: Narayanan et al., "PipeDream", SOSP 2019, in its flushed form. Interleaved: Narayanan et al.,
"Efficient large-scale language model training on GPU clusters using Megatron-LM", SC 2021. Hybrid:
Megatron-core's `microbatch_group_size_per_vp_stage`. ZB-H1: Qi et al., "Zero bubble pipeline
parallelism", ICLR 2024.
"""

from collections.abc import Sequence

from planner.errors import UsageError
from planner.plan.types import Opcode
from planner.schedule.order import (
    ComputeStep,
    Order,
    backward_steps,
    forward_step,
    require_loops,
    require_one_stage,
)
from planner.solve.types import Placement

__all__ = ["hybrid_order", "interleaved_order", "one_f_one_b_order", "zero_bubble_order"]


def one_f_one_b_order(placement: Placement) -> Order:
    """1F1B: rank r runs P - r - 1 forwards ahead, so it stores P - r micro-batches at most.

    Raises:
        UsageError: a rank has no stage, or several.
    """
    require_one_stage(placement)
    num_ranks, micro_batches = placement.num_pipeline_ranks, range(placement.num_micro_batches)
    return Order(
        ranks=tuple(
            _alternate(
                [forward_step(rank, micro_batch) for micro_batch in micro_batches],
                [backward_steps(placement, rank, (micro_batch,)) for micro_batch in micro_batches],
                num_warm_up=num_ranks - rank - 1,
            )
            for rank in range(num_ranks)
        )
    )


def interleaved_order(placement: Placement) -> Order:
    """Depth-first: P micro-batches through one of the rank's stages, then through its next.

    Raises:
        UsageError: ranks have different numbers of stages, or the number of micro-batches is not
            a multiple of the number of ranks.
    """
    num_ranks, num_micro_batches = placement.num_pipeline_ranks, placement.num_micro_batches
    if num_micro_batches % num_ranks:
        raise UsageError(
            "the interleaved schedule needs a number of micro-batches that is a multiple of its "
            f"{num_ranks} pipeline ranks, not {num_micro_batches}",
            hint=f"take {-(-num_micro_batches // num_ranks) * num_ranks} micro-batches, or the "
            "hybrid schedule with larger groups",
        )
    return _loops(placement, num_ranks)


def hybrid_order(placement: Placement) -> Order:
    """As interleaved, with groups of `placement.group_size` micro-batches instead of P.

    Groups of all micro-batches make it breadth-first. The last group may be smaller.

    Raises:
        UsageError: ranks have different numbers of stages, the group size is not between the
            numbers of ranks and of micro-batches, or the last group has fewer than P.
    """
    num_ranks, num_micro_batches = placement.num_pipeline_ranks, placement.num_micro_batches
    size = placement.group_size
    if not num_ranks <= size <= num_micro_batches:
        raise UsageError(
            f"groups of {size} micro-batches: the hybrid schedule takes from {num_ranks} (as many "
            f"as pipeline ranks) to {num_micro_batches} (all micro-batches)",
            hint="change the group size" if num_ranks <= num_micro_batches else _MORE,
        )
    if 0 < num_micro_batches % size < num_ranks:
        raise UsageError(
            f"{num_micro_batches} micro-batches in groups of {size} leave a last group of "
            f"{num_micro_batches % size}, fewer than the {num_ranks} pipeline ranks: they can "
            "come to wait for each other",
            hint=f"take a group size that leaves none, or at least {num_ranks}",
        )
    return _loops(placement, size)


def zero_bubble_order(placement: Placement) -> Order:
    """ZB-H1: 1F1B with the weights' half of backward put off, by r micro-batches on rank r.

    So every rank stores P micro-batches, the most that 1F1B stores on any, and the halves put off
    fill the time in which 1F1B drains. With forward, input and weight halves of one second each,
    the bubble is P - 1 seconds, a third of 1F1B's.

    Raises:
        UsageError: a rank has no stage, or several.
    """
    require_one_stage(placement)
    num_ranks, num_micro_batches = placement.num_pipeline_ranks, placement.num_micro_batches
    ranks = []
    for rank in range(num_ranks):
        weights = [
            ComputeStep(opcode=Opcode.BACKWARD_WEIGHT, stage=rank, micro_batch=micro_batch)
            for micro_batch in range(num_micro_batches)
        ]
        backward = []
        for micro_batch in range(num_micro_batches):
            inputs = backward_steps(placement, rank, (micro_batch,), Opcode.BACKWARD_INPUT)
            late = weights[max(0, micro_batch - rank) : max(0, micro_batch + 1 - rank)]
            backward.append([*inputs, *late])
        backward.append(weights[max(0, num_micro_batches - rank) :])
        forward = [forward_step(rank, micro_batch) for micro_batch in range(num_micro_batches)]
        ranks.append(_alternate(forward, backward, num_warm_up=num_ranks - rank - 1))
    return Order(ranks=tuple(ranks))


_MORE = "take at least as many micro-batches as pipeline ranks, or the layered schedule"


def _loops(placement: Placement, group_size: int) -> Order:
    """Groups of micro-batches, each through all stages of the rank, one after the other.

    Rank r runs 2 (P - r - 1) + (V - 1) G forwards ahead (Megatron's warm-up).
    """
    num_loops, num_ranks = require_loops(placement), placement.num_pipeline_ranks
    groups = _groups(placement.num_micro_batches, group_size)
    ranks = []
    for rank in range(num_ranks):
        stages = range(rank, placement.num_stages, num_ranks)
        forward = [forward_step(s, m) for group in groups for s in stages for m in group]
        backward = [
            backward_steps(placement, stage, (micro_batch,))
            for group in groups
            for stage in reversed(stages)
            for micro_batch in group
        ]
        num_warm_up = 2 * (num_ranks - rank - 1) + (num_loops - 1) * group_size
        ranks.append(_alternate(forward, backward, num_warm_up=num_warm_up))
    return Order(ranks=tuple(ranks))


def _groups(num_micro_batches: int, size: int) -> list[range]:
    starts = range(0, num_micro_batches, size)
    return [range(start, min(start + size, num_micro_batches)) for start in starts]


def _alternate(
    forward: Sequence[ComputeStep],
    backward: Sequence[Sequence[ComputeStep]],
    *,
    num_warm_up: int,
) -> tuple[ComputeStep, ...]:
    """Some forwards, then one forward and one backward in turn, then the other backwards."""
    steps = list(forward[:num_warm_up])
    late = forward[num_warm_up:]
    for ahead, back in zip(late, backward, strict=False):
        steps += (ahead, *back)
    for back in backward[len(late) :]:
        steps += back
    return tuple(steps)
