"""What an order is: the sequence of compute that each pipeline rank does.

The families beside this module make one from a placement. None of them knows costs, buffers or
transfers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from planner.errors import UsageError
from planner.plan.types import Opcode
from planner.solve.types import Placement

__all__ = [
    "ComputeStep",
    "Order",
    "backward_steps",
    "forward_step",
    "local_stages",
    "require_complete",
    "require_loops",
    "require_one_stage",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeStep:
    """One compute instruction before its buffers are known."""

    opcode: Opcode
    """FORWARD, RECOMPUTE, BACKWARD, or its halves BACKWARD_INPUT and BACKWARD_WEIGHT."""
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The compute steps of every pipeline rank."""

    ranks: tuple[tuple[ComputeStep, ...], ...]


def local_stages(placement: Placement) -> list[list[int]]:
    """The stages of each pipeline rank, ascending."""
    found: list[list[int]] = [[] for _ in range(placement.num_pipeline_ranks)]
    for stage, rank in enumerate(placement.stage_ranks):
        found[rank].append(stage)
    return found


def forward_step(stage: int, micro_batch: int) -> ComputeStep:
    """FORWARD of one micro-batch."""
    return ComputeStep(opcode=Opcode.FORWARD, stage=stage, micro_batch=micro_batch)


def backward_steps(
    placement: Placement,
    stage: int,
    micro_batches: Iterable[int],
    opcode: Opcode = Opcode.BACKWARD,
) -> list[ComputeStep]:
    """BACKWARD (or `opcode`) of these micro-batches, each right behind its RECOMPUTE if any."""
    steps = []
    for micro_batch in micro_batches:
        if placement.recompute[stage]:
            again = ComputeStep(opcode=Opcode.RECOMPUTE, stage=stage, micro_batch=micro_batch)
            steps.append(again)
        steps.append(ComputeStep(opcode=opcode, stage=stage, micro_batch=micro_batch))
    return steps


def require_complete(order: Order, placement: Placement) -> None:
    """Refuse an order that does not take every micro-batch through every stage and back.

    Raises:
        UsageError: a step is missing, unknown, stands twice, or is on a rank without its stage.
    """
    num_stages, num_micro_batches = placement.num_stages, placement.num_micro_batches
    if len(order.ranks) != placement.num_pipeline_ranks:
        raise _wrong(f"{len(order.ranks)} ranks instead of {placement.num_pipeline_ranks}")
    seen: set[tuple[Opcode, int, int]] = set()
    for rank, steps in enumerate(order.ranks):
        for step in steps:
            key = (step.opcode, step.stage, step.micro_batch)
            where = f"{step.opcode.value} of stage {step.stage}, micro-batch {step.micro_batch}"
            if not (0 <= step.stage < num_stages and 0 <= step.micro_batch < num_micro_batches):
                raise _wrong(f"{where}, is unknown")
            if placement.stage_ranks[step.stage] != rank:
                raise _wrong(f"{where} is on rank {rank}, its stage elsewhere")
            if key in seen:
                raise _wrong(f"{where} stands twice")
            seen.add(key)
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            done = {opcode for opcode in Opcode if (opcode, stage, micro_batch) in seen}
            wanted = {Opcode.FORWARD, *([Opcode.RECOMPUTE] if placement.recompute[stage] else [])}
            if done not in ({*wanted, Opcode.BACKWARD}, wanted | _HALVES):
                names = ", ".join(sorted(opcode.value for opcode in done)) or "nothing"
                raise _wrong(f"stage {stage}, micro-batch {micro_batch} has {names}")


_HALVES = {Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT}


def _wrong(what: str) -> UsageError:
    return UsageError(
        f"the order of compute is not a whole step: {what}",
        hint="give each stage and micro-batch one FORWARD and one BACKWARD (or both halves), and "
        "a RECOMPUTE where the placement asks for it",
    )


def require_one_stage(placement: Placement) -> None:
    """Refuse a placement that is not stage s on rank s.

    Raises:
        UsageError: a rank has no stage, or several, or another than its own.
    """
    num_ranks = placement.num_pipeline_ranks
    if placement.stage_ranks != tuple(range(num_ranks)):
        raise UsageError(
            f"the {placement.schedule.value} schedule needs one stage per pipeline rank, stage s "
            f"on rank s; here {_placed(placement)}",
            hint=f"cut the model into {num_ranks} stages, or take the layered, interleaved or "
            "hybrid schedule",
        )


def require_loops(placement: Placement) -> int:
    """Stages per rank, of a placement with stage s on rank s mod P and as many on every rank.

    Raises:
        UsageError: the placement is another.
    """
    num_ranks, num_stages = placement.num_pipeline_ranks, placement.num_stages
    wanted = tuple(stage % num_ranks for stage in range(num_stages))
    if num_stages % num_ranks or placement.stage_ranks != wanted:
        raise UsageError(
            f"the {placement.schedule.value} schedule needs as many stages on every pipeline rank, "
            f"stage s on rank s mod {num_ranks}; here {_placed(placement)}",
            hint=f"take a number of stages that is a multiple of {num_ranks}, or the layered "
            "schedule",
        )
    return num_stages // num_ranks


def _placed(placement: Placement) -> str:
    counts = [len(stages) for stages in local_stages(placement)]
    return (
        f"{placement.num_stages} stages are on {placement.num_pipeline_ranks} ranks, "
        f"{min(counts)} to {max(counts)} on each"
    )
