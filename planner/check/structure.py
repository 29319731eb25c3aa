"""Rules on the compute instructions alone: coverage, the layered order, keyed randomness."""

from collections import Counter
from collections.abc import Iterator

from planner.check.counts import end_of
from planner.check.expected import BACKWARDS, COMPUTE
from planner.check.types import Cell, Failure
from planner.plan.types import Instruction, Opcode, Plan, StagePlan
from planner.schedules import Schedule

__all__ = ["every_layer_once", "every_pass_once", "keyed_randomness", "layered_order"]

_HALVES = (Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT)
_BEHIND = {
    Opcode.BACKWARD_WEIGHT: Opcode.BACKWARD_INPUT,
    # It must find the buffers of modules (running statistics) as FORWARD found them.
    Opcode.RECOMPUTE: Opcode.FORWARD,
}
Pass = tuple[int | None, int | None]
"""(stage, micro-batch)."""


def every_layer_once(plan: Plan) -> Failure | None:
    """Rule 1: every layer in exactly one stage, in order; every stage on its own rank only."""
    layers = [layer for stage in plan.stages for layer in stage.layers]
    if layers != list(plan.layer_names):
        return Failure(message=f"{_layer_fault(plan, layers)}: look at the plan's stages")
    made = [name for stage in plan.stages for name in stage.outputs]
    if len(set(made)) < len(made):
        twice, _ = Counter(made).most_common(1)[0]
        return Failure(message=f"two stages make {twice}: look at the plan's stages")
    # Modules that are no layers (masks, rotary tables) run again wherever they are used.
    names = set(plan.layer_names)
    called = [s for stage in plan.stages for s in stage.code if s.path in names]
    twice, number = Counter(s.target for s in called).most_common(1)[0] if called else ("", 0)
    if number > 1:
        return Failure(message=f"two stages call the layer of {twice}: look at their code")
    stage_ranks = [stage.rank for stage in plan.stages]
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            if instruction.opcode in COMPUTE and stage_ranks[instruction.stage or 0] != rank:
                home = stage_ranks[instruction.stage or 0]
                message = f"stage {instruction.stage} is on rank {home} but runs on rank {rank}"
                return Failure(message=message, cells=((rank, index),))
    return None


def _layer_fault(plan: Plan, layers: list[str]) -> str:
    counts = Counter(layers)
    for layer in plan.layer_names:
        if counts[layer] != 1:
            return f"layer {layer} is in {counts[layer]} stages instead of one"
    return f"the stages hold layers {', '.join(layers[:8])} ..., not those of the model in order"


def every_pass_once(plan: Plan) -> Failure | None:
    """Rule 2: each stage runs each micro-batch forward once and backward once.

    Backward runs whole or in two halves, that for inputs first. A stage that recomputes runs
    forward once more, later, others never. A plan of evaluation has no backward.
    """
    counts: dict[Opcode, dict[Pass, int]] = {opcode: {} for opcode in COMPUTE}
    for rank, program in enumerate(plan.programs):
        for index, instruction in enumerate(program):
            opcode = instruction.opcode
            if opcode in COMPUTE:
                key, found = (instruction.stage, instruction.micro_batch), counts[opcode]
                found[key] = found.get(key, 0) + 1
                first = _BEHIND.get(opcode)
                if first is not None and key not in counts[first]:
                    message = f"stage {key[0]}, micro-batch {key[1]}: {opcode.value} stands before "
                    message += f"its {first.value}"
                    return Failure(message=message, cells=((rank, index),))
    for stage in plan.stages:
        for micro_batch in range(plan.num_micro_batches):
            key = (stage.index, micro_batch)
            halved = any(key in counts[opcode] for opcode in _HALVES)
            for opcode, wanted in _wanted(plan, stage, halved):
                number = counts[opcode].get(key, 0)
                if number != wanted:
                    cells = _cells_of_pass(plan, key, opcode)
                    return Failure(
                        message=f"{opcode.value} of stage {stage.index}, micro-batch {micro_batch} "
                        f"stands {number} times instead of {wanted}",
                        cells=cells or end_of(plan, stage.rank),
                    )
    return None


def _wanted(plan: Plan, stage: StagePlan, halved: bool) -> Iterator[tuple[Opcode, int]]:
    """How often each compute instruction of one stage and micro-batch stands in the programs."""
    trains = plan.schedule is not Schedule.FORWARD
    yield Opcode.FORWARD, 1
    yield Opcode.RECOMPUTE, int(stage.recompute and trains)
    yield Opcode.BACKWARD, int(trains and not halved)
    for opcode in _HALVES:
        yield opcode, int(trains and halved)


def _cells_of_pass(plan: Plan, key: Pass, opcode: Opcode) -> tuple[Cell, ...]:
    found = [
        (rank, index)
        for rank, program in enumerate(plan.programs)
        for index, step in enumerate(program)
        if step.opcode is opcode and (step.stage, step.micro_batch) == key
    ]
    return tuple(reversed(found))


def layered_order(plan: Plan) -> Failure | None:
    """Rule 3: the layered order on every rank, of plans that claim it.

    Forward: stage by stage, ascending, all micro-batches of one before the next, and ascending.
    Then backward: stage by stage, descending, micro-batches ascending, so that a rank ends the
    backward pass of all micro-batches through a stage before it begins any preceding one. Compute
    is one stream, so program order is the order of every interleaving. RECOMPUTE may stand wherever
    its data allow. Other schedules of ours claim only that each stage's FORWARDs ascend: running
    statistics of the user's modules depend on their order.
    """
    if plan.schedule in (Schedule.FORWARD, Schedule.CUSTOM):
        return None
    if plan.schedule is not Schedule.LAYERED:
        return _forward_order(plan)
    for rank, program in enumerate(plan.programs):
        before: tuple[int, Instruction] | None = None
        for index, step in enumerate(program):
            if step.opcode is Opcode.FORWARD or step.opcode in BACKWARDS:
                if before and _place(before[1]) > _place(step):
                    return Failure(
                        message=f"{_name(step)} stands behind {_name(before[1])}: the layered order"
                        " is forward by stage, then backward by stage, the last first, each with "
                        "micro-batches ascending",
                        cells=((rank, index), (rank, before[0])),
                    )
                before = (index, step)
    return None


def _forward_order(plan: Plan) -> Failure | None:
    for rank, program in enumerate(plan.programs):
        last: dict[int | None, tuple[int, Instruction]] = {}
        for index, step in enumerate(program):
            if step.opcode is not Opcode.FORWARD:
                continue
            before = last.get(step.stage)
            if before and _place(before[1]) > _place(step):
                message = f"{_name(step)} stands behind {_name(before[1])}: the micro-batches of a "
                message += "stage must run forward in ascending order"
                return Failure(message=message, cells=((rank, index), (rank, before[0])))
            last[step.stage] = index, step
    return None


def _place(step: Instruction) -> tuple[int, int, int]:
    """Where a step stands in the layered order."""
    if step.opcode is Opcode.FORWARD:
        return 0, step.stage or 0, step.micro_batch or 0
    return 1, -(step.stage or 0), step.micro_batch or 0


def _name(step: Instruction) -> str:
    return f"{step.opcode.value} of stage {step.stage}, micro-batch {step.micro_batch},"


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
    expected, where = 0, "look at the code of the plan's stages"
    for first, num, stage_index in (*drawn, (plan.num_random_operators, 0, plan.num_stages)):
        if first < expected:
            message = f"key {first} of stage {stage_index} is drawn twice or unknown"
            return Failure(message=f"{message}: {where}")
        if first > expected:
            message = f"no stage draws key {expected}: a random operator is lost"
            return Failure(message=f"{message}; {where}")
        expected = first + num
    return None
