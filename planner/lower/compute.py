"""The compute instructions of one rank: buffers of FORWARD, RECOMPUTE, BACKWARD and LOAD."""

from dataclasses import dataclass

from planner.lower.routes import Route
from planner.plan.types import Instruction, Opcode, StagePlan, Unit
from planner.schedule import ComputeStep

__all__ = ["StageContext", "compute_instruction", "load_instruction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What the compute instructions of one stage refer to."""

    stage: StagePlan
    units: tuple[Unit, ...]
    routes: dict[str, Route]
    """By tensor, for all tensors that the stage makes or reads."""
    kept_tensors: tuple[str, ...]
    """Inputs, outputs and batch keys that backward needs as well (without recompute)."""
    weight_buffers: dict[str, tuple[str, str]]
    """Unit -> its weights buffer in the forward and in the backward pass."""
    neighbours: tuple[int, ...]
    """All stages of the same rank."""
    gradient_buffers: dict[str, str]
    """Trainable unit -> its accumulation buffer."""

    def position(self, tensor: str) -> int:
        """The stage's place in the tensor's chain."""
        return self.routes[tensor].chain.index(self.stage.index)

    def has_later_reader(self, tensor: str) -> bool:
        return self.position(tensor) + 1 < len(self.routes[tensor].chain)


def compute_instruction(context: StageContext, step: ComputeStep) -> Instruction:
    """The instruction of one compute step, with every buffer it reads and writes."""
    match step.opcode:
        case Opcode.FORWARD:
            reads, writes = _forward_buffers(context, step.micro_batch)
        case Opcode.RECOMPUTE:
            reads, writes = _recompute_buffers(context, step.micro_batch)
        case _:
            reads, writes = _backward_buffers(context, step.micro_batch)
    return Instruction(
        opcode=step.opcode,
        stream="compute",
        stage=step.stage,
        micro_batch=step.micro_batch,
        reads=tuple(dict.fromkeys(reads)),
        writes=tuple(dict.fromkeys(writes)),
    )


def _buffer(context: StageContext, name: str, micro_batch: int) -> str:
    prefix = "batch:" if name in context.stage.batch_keys else ""
    return f"{prefix}{name}.{micro_batch}"


def _inputs(context: StageContext, micro_batch: int) -> list[str]:
    tensors = [f"{name}.{micro_batch}" for name in context.stage.inputs]
    return tensors + [f"batch:{key}.{micro_batch}" for key in context.stage.batch_keys]


def _saved(context: StageContext, micro_batch: int) -> str:
    return f"saved:{context.stage.index}.{micro_batch}"


def _forward_buffers(context: StageContext, micro_batch: int) -> tuple[list[str], list[str]]:
    weights = [forward for forward, _ in context.weight_buffers.values()]
    writes = [f"{name}.{micro_batch}" for name in context.stage.outputs]
    if not context.stage.recompute:
        writes.append(_saved(context, micro_batch))
    return _inputs(context, micro_batch) + weights, writes


def _recompute_buffers(context: StageContext, micro_batch: int) -> tuple[list[str], list[str]]:
    weights = [backward for _, backward in context.weight_buffers.values()]
    return _inputs(context, micro_batch) + weights, [_saved(context, micro_batch)]


def _backward_buffers(context: StageContext, micro_batch: int) -> tuple[list[str], list[str]]:
    reads = [_saved(context, micro_batch)]
    if not context.stage.recompute:
        reads += [_buffer(context, name, micro_batch) for name in context.kept_tensors]
    reads += [backward for _, backward in context.weight_buffers.values()]
    writes = []
    for name in (*context.stage.outputs, *context.stage.inputs):
        if name == "loss" or not context.routes[name].requires_grad:
            continue
        if context.has_later_reader(name):
            reads.append(f"gradient:{name}.{micro_batch}")
        if name in context.stage.inputs:
            writes.append(f"gradient:{name}.{micro_batch}")
    for unit in context.units:
        if unit.trainable:
            more_reads, more_writes = _gradient_buffers(context, unit, micro_batch)
            reads += more_reads
            writes += more_writes
    return reads, writes


def _gradient_buffers(
    context: StageContext, unit: Unit, micro_batch: int
) -> tuple[list[str], list[str]]:
    """What BACKWARD accumulates into; the first to write only writes: it starts from zero.

    An exact unit's later stages leave their gradient of each micro-batch in a `part` buffer,
    and its first stage, which runs backward last, adds that part to its own before it adds
    both to the sum.
    """
    total = context.gradient_buffers[unit.name]
    part = f"part:{unit.name}.{micro_batch}"
    is_last_user = context.stage.index == unit.stages[-1]
    is_first_user = context.stage.index == unit.stages[0]
    if unit.exact:
        reads = [] if is_last_user else [part]
        if not is_first_user:
            return reads, [part]
        return (reads if micro_batch == 0 else [*reads, total]), [total]
    later_users = {stage for stage in unit.stages if stage > context.stage.index}
    starts = micro_batch == 0 and later_users.isdisjoint(context.neighbours)
    return ([] if starts else [total]), [total]


def load_instruction(
    context: StageContext, micro_batch: int, loaded: set[str]
) -> Instruction | None:
    """LOAD of the keys that this stage needs and the rank has not loaded; extends `loaded`."""
    keys = [f"batch:{key}.{micro_batch}" for key in context.stage.batch_keys]
    fresh = tuple(key for key in keys if key not in loaded)
    if not fresh:
        return None
    loaded.update(fresh)
    return Instruction(
        opcode=Opcode.LOAD,
        stream="copy",
        stage=context.stage.index,
        micro_batch=micro_batch,
        writes=fresh,
    )
