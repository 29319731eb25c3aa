"""What a problem demands of its plans: whether one meets it, and which demand could be withdrawn.

This module knows the fields of constraints and of placements. It does not know what fits.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from planner.solve import Constraints, Placement
from planner.words import counted

__all__ = ["Describe", "batch_words", "device_words", "meets", "withdrawn"]

Describe = Callable[[Placement], str]
"""What a plan has in the place of what was demanded."""


def meets(wanted: Constraints, placement: Placement) -> bool:
    """Whether a placement has all that is demanded."""
    ranks, stages = placement.num_pipeline_ranks, placement.num_stages
    per_rank = stages / ranks
    recompute = None
    if len(set(placement.recompute)) == 1:
        recompute = placement.recompute[0]
    given: dict[str, object] = {
        "num_replicas": placement.num_replicas,
        "num_pipeline_ranks": ranks,
        "stages_per_rank": per_rank,
        "micro_batch_size": placement.micro_batch_size,
        "num_micro_batches": placement.num_micro_batches,
        "partition": placement.partition,
        "recompute": recompute,
        "offload_state": placement.offload_state,
        "offload_inputs": placement.offload_inputs,
        "schedule": placement.schedule,
    }
    if wanted.num_buffers is not None:
        given["num_buffers"] = placement.num_weight_buffers
        # More buffers than stages are as good as one for each.
        wanted = replace(wanted, num_buffers=min(wanted.num_buffers, max(1, int(per_rank))))
    return all(getattr(wanted, name) in (None, value) for name, value in given.items())


def withdrawn(wanted: Constraints) -> Iterator[tuple[Constraints, Describe]]:
    """The demands without one of them, each in turn, and how to say what a plan has instead."""
    for names, describe in _DEMANDS:
        if any(getattr(wanted, name) is not None for name in names):
            yield replace(wanted, **dict.fromkeys(names)), describe


def device_words(placement: Placement) -> str:
    """How many it uses, and for what."""
    return f"{placement.world_size} devices ({_mesh(placement)})"


def batch_words(placement: Placement) -> str:
    """The samples of its step."""
    return f"a global batch of {counted(placement.global_batch_size, 'sample')}"


def _recompute(placement: Placement) -> str:
    if not any(placement.recompute):
        return "recompute nothing"
    if all(placement.recompute):
        return "recompute the activations"
    return f"recompute the activations of {counted(sum(placement.recompute), 'stage')}"


def _partition(placement: Placement) -> str:
    return f"partition level {placement.partition}"


def _groups(placement: Placement) -> str:
    if not placement.partition:
        return "nothing partitioned"
    return f"the state partitioned over {counted(placement.num_parts, 'replica')}"


def _micro_batches(placement: Placement) -> str:
    number = counted(placement.num_micro_batches, "micro-batch", "es")
    return f"{number} of {placement.micro_batch_size} per replica"


def _stages(placement: Placement) -> str:
    if not placement.is_modular:
        ranks = ", ".join(map(str, placement.stage_ranks))
        return f"{placement.num_stages} stages on ranks {ranks}"
    loops = placement.num_stages // placement.num_pipeline_ranks
    return f"{counted(loops, 'stage')} per rank"


def _mesh(placement: Placement) -> str:
    replicas = counted(placement.num_replicas, "replica")
    return f"{replicas} x {counted(placement.num_pipeline_ranks, 'pipeline rank')}"


def _offload(placement: Placement) -> str:
    names = ["state"] * placement.offload_state + ["stored inputs"] * placement.offload_inputs
    return f"offload {' and '.join(names) or 'nothing'} to host memory"


def _schedule(placement: Placement) -> str:
    return f"the {placement.schedule.value} schedule"


def _buffers(placement: Placement) -> str:
    return f"pools of {counted(placement.num_weight_buffers, 'buffer')}"


_DEMANDS: tuple[tuple[tuple[str, ...], Describe], ...] = (
    (("recompute",), _recompute),
    (("partition",), _partition),
    (("partition_within",), _groups),
    (("micro_batch_size", "num_micro_batches"), _micro_batches),
    (("stages_per_rank",), _stages),
    (("modular",), _stages),
    (("num_replicas", "num_pipeline_ranks"), _mesh),
    (("offload_state",), _offload),
    (("offload_inputs",), _offload),
    (("num_buffers",), _buffers),
    (("schedule",), _schedule),
)
"""Constraints that are withdrawn together, and what the plan found has instead."""
