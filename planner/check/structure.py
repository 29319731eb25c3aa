"""Rules on the compute instructions alone: coverage, the layered order, keyed randomness."""

from collections import Counter

from planner.check.types import Failure
from planner.plan.types import Opcode, Plan

__all__ = ["every_layer_once", "every_pass_once", "keyed_randomness", "layered_order"]

_COMPUTE = (Opcode.FORWARD, Opcode.RECOMPUTE, Opcode.BACKWARD)


def every_layer_once(plan: Plan) -> Failure | None:
    """Rule 1: every layer in exactly one stage, in order; every stage on its own rank only."""
    layers = [layer for stage in plan.stages for layer in stage.layers]
    if layers != list(plan.layer_names):
        counts = Counter(layers)
        for layer in plan.layer_names:
            if counts[layer] != 1:
                return Failure(message=f"layer {layer} is in {counts[layer]} stages instead of one")
        return Failure(message=f"the stages hold layers {layers[:8]}..., not in the model's order")
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            if instruction.opcode in _COMPUTE and instruction.stage is not None:
                home = plan.stages[instruction.stage].rank
                if home != rank:
                    message = f"stage {instruction.stage} is on rank {home} but runs on rank {rank}"
                    return Failure(message=message, cells=((rank, index),))
    return None


def every_pass_once(plan: Plan) -> Failure | None:
    """Rule 2: each stage runs each micro-batch forward once and backward once.

    A stage that recomputes runs it once more, others never.
    """
    found: dict[tuple[Opcode, int | None, int | None], list[tuple[int, int]]] = {}
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            if instruction.opcode in _COMPUTE:
                key = (instruction.opcode, instruction.stage, instruction.micro_batch)
                found.setdefault(key, []).append((rank, index))
    for stage in plan.stages:
        for micro_batch in range(plan.num_micro_batches):
            for opcode in _COMPUTE:
                wanted = 1 if opcode is not Opcode.RECOMPUTE or stage.recompute else 0
                cells = found.get((opcode, stage.index, micro_batch), [])
                if len(cells) != wanted:
                    return Failure(
                        message=f"{opcode.value} of stage {stage.index}, micro-batch "
                        f"{micro_batch} stands {len(cells)} times instead of {wanted}",
                        cells=tuple(reversed(cells)) or _end_of(plan, stage.rank),
                    )
    return None


def layered_order(plan: Plan) -> Failure | None:
    """Rule 3: the layered order on every rank.

    Forward: stages ascending, micro-batches ascending within a stage. Backward: stages
    descending, micro-batches ascending, so that a rank ends the backward pass of all
    micro-batches through a stage before it begins any preceding one. RECOMPUTE stands right
    before its BACKWARD.
    """
    for rank, program in enumerate(plan.programs):
        stages = [stage for stage in plan.stages if stage.rank == rank]
        micro_batches = range(plan.num_micro_batches)
        wanted = [(Opcode.FORWARD, stage.index, m) for stage in stages for m in micro_batches]
        for stage in reversed(stages):
            for micro_batch in micro_batches:
                if stage.recompute:
                    wanted.append((Opcode.RECOMPUTE, stage.index, micro_batch))
                wanted.append((Opcode.BACKWARD, stage.index, micro_batch))
        compute = [(i, step) for i, step in enumerate(program) if step.opcode in _COMPUTE]
        for position, (index, step) in enumerate(compute):
            expected = wanted[position] if position < len(wanted) else None
            if step.stream != "compute" or (step.opcode, step.stage, step.micro_batch) != expected:
                what = "nothing" if expected is None else f"{expected[0]} {expected[1:]}"
                message = f"the layered order has {what} (stage, micro-batch) here"
                return Failure(message=message, cells=((rank, index),))
        if len(compute) < len(wanted):
            opcode, missing, micro_batch = wanted[len(compute)]
            message = f"the program ends before {opcode} of stage {missing}, {micro_batch}"
            return Failure(message=message, cells=_end_of(plan, rank))
    return None


def keyed_randomness(plan: Plan) -> Failure | None:
    """Rule 9: every random operator of a micro-batch has one key, drawn again by RECOMPUTE.

    A key is the operator's ordinal in one whole forward, which stands in the stage's code, and
    FORWARD and RECOMPUTE run that same code; so it is enough that no ordinal stands in two
    places, none is missing, and the model's count is right.
    """
    drawn = sorted(
        (statement.first_random_operator, statement.num_random_operators, stage.index)
        for stage in plan.stages
        for statement in stage.code
        if statement.num_random_operators
    )
    expected = 0
    for first, num, stage_index in (*drawn, (plan.num_random_operators, 0, plan.num_stages)):
        if first < expected:
            return Failure(message=f"key {first} of stage {stage_index} is drawn twice or unknown")
        if first > expected:
            return Failure(message=f"no stage draws key {expected}: a random operator is lost")
        expected = first + num
    return None


def _end_of(plan: Plan, rank: int) -> tuple[tuple[int, int], ...]:
    return ((rank, len(plan.programs[rank]) - 1),) if plan.programs[rank] else ()
