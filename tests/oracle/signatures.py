"""Which operands each instruction may have, and what each entry of the buffer table must hold.

This module knows names, shapes and types. It does not know in which order anything happens.
"""

import math
from collections.abc import Iterator

from oracle.facts import BACKWARDS, COMPUTE, Facts, Fault, kind_of
from planner.plan.types import Buffer, Instruction, Opcode, Unit

__all__ = ["malformed", "sum_units"]

Operands = tuple[list[str], list[str]]
"""Reads and writes. Pool buffers stand as `weights` and `sum`, whichever of them it is."""


def malformed(facts: Facts) -> Iterator[Fault]:
    """Instructions that mean nothing, and buffers that cannot hold what is put into them."""
    for rank, program in enumerate(facts.plan.programs):
        for index, instruction in enumerate(program):
            where = f"rank {rank}, {index} {instruction.opcode}"
            missing = _missing(facts, rank, instruction)
            if missing or not _well_formed(facts, rank, instruction):
                yield Fault(kind="signature", message=f"{where}: {missing or instruction}")
                continue
            for buffer in (*instruction.reads, *instruction.writes):
                if not _fits(facts, rank, buffer, instruction):
                    entry = facts.entry(rank, buffer)
                    yield Fault(kind="shape", message=f"{where}: {buffer} is {entry}")


def sum_units(facts: Facts, instruction: Instruction) -> list[Unit]:
    """The units whose sums a backward adds to, in the order of the sums that it writes."""
    if instruction.stage is None or instruction.opcode is Opcode.BACKWARD_INPUT:
        return []
    units = facts.units_of(facts.plan.stages[instruction.stage])
    mine = [u for u in units if u.trainable]
    return [u for u in mine if not u.exact or u.stages[0] == instruction.stage]


def _missing(facts: Facts, rank: int, instruction: Instruction) -> str | None:
    """A reference to something that the plan does not hold."""
    plan = facts.plan
    ranges = (
        ("stage", instruction.stage, len(plan.stages)),
        ("micro_batch", instruction.micro_batch, plan.num_micro_batches),
        ("peer", instruction.peer, plan.num_pipeline_ranks),
    )
    for name, number, end in ranges:
        if number is not None and not 0 <= number < end:
            return f"no {name} {number}"
    if instruction.unit is not None and instruction.unit not in facts.units:
        return f"no unit {instruction.unit}"
    buffers = (*instruction.reads, *instruction.writes)
    return next((f"no buffer {b}" for b in buffers if facts.entry(rank, b) is None), None)


def _well_formed(facts: Facts, rank: int, instruction: Instruction) -> bool:
    reads, writes = instruction.reads, instruction.writes
    if len(set(reads)) < len(reads) or len(set(writes)) < len(writes):
        return False
    if instruction.stream != _stream(facts, instruction):
        return False
    names_of_sums = {b for b in reads if kind_of(b) == "sum"}
    if instruction.opcode in BACKWARDS:
        # Whether a sum is read says whether it starts: that is judged by execution.
        if not names_of_sums <= set(writes):
            return False
        reads = tuple(b for b in reads if b not in names_of_sums)
    found = [sorted(_pooled(facts, b) for b in buffers) for buffers in (reads, writes)]
    options = _operands(facts, rank, instruction)
    return any(found == [sorted(wanted) for wanted in option] for option in options)


def _pooled(facts: Facts, buffer: str) -> str:
    kind = kind_of(buffer)
    return kind if kind == "sum" or (kind == "weights" and facts.plan.gathers) else buffer


def _stream(facts: Facts, instruction: Instruction) -> str:
    match instruction.opcode:
        case Opcode.UPDATE if facts.plan.options.update_on_host:
            return "host"
        case Opcode.SEND:
            return f"to.{instruction.peer}"
        case Opcode.RECEIVE:
            return f"from.{instruction.peer}"
        case Opcode.LOAD | Opcode.FETCH:
            return "copy.in"
        case Opcode.EVICT | Opcode.SAVE:
            return "copy.out"
        case Opcode.RELEASE | Opcode.UPDATE:
            return "compute"
    return "compute" if instruction.opcode in COMPUTE else "data"


def _operands(facts: Facts, rank: int, instruction: Instruction) -> list[Operands]:
    """Every pair of operand lists that the instruction may have."""
    match instruction.opcode:
        case Opcode.SEND | Opcode.RECEIVE:
            return _transfer(facts, rank, instruction)
        case Opcode.FETCH | Opcode.EVICT:
            return _copy(facts, instruction)
        case Opcode.RELEASE:
            return _release(facts, instruction)
        case Opcode.LOAD:
            written, m = list(instruction.writes), instruction.micro_batch
            keys = {f"batch:{key}.{m}" for key in facts.batch}
            return [([], written)] if written and m is not None and set(written) <= keys else []
        case Opcode.CHECK_FINITE | Opcode.CLIP:
            if instruction.opcode is Opcode.CLIP and facts.plan.options.clip_delayed:
                squares = [f"square:{unit.name}" for unit in facts.trainable_on(rank)]
                return [(squares, ["clip:scale"])]
            sources = [_source(facts, unit) for unit in facts.trainable_on(rank)]
            made = "finite" if instruction.opcode is Opcode.CHECK_FINITE else "scale"
            return [(sources, [made])]
    if instruction.opcode in COMPUTE:
        return _compute(facts, rank, instruction)
    return _of_unit(facts, instruction) if instruction.unit is not None else []


def _transfer(facts: Facts, rank: int, instruction: Instruction) -> list[Operands]:
    sends, m, stage = instruction.opcode is Opcode.SEND, instruction.micro_batch, instruction.stage
    receiver = instruction.peer if sends else rank
    if stage is None or instruction.peer in (None, rank):
        return []
    if facts.plan.stages[stage].rank != receiver:
        return []
    names = [name for name in facts.tensors if stage in facts.chain(name)]
    buffers = [f"{prefix}{name}.{m}" for name in names for prefix in ("", "gradient:")]
    return [([b], []) if sends else ([], [b]) for b in buffers]


def _copy(facts: Facts, instruction: Instruction) -> list[Operands]:
    found = _movable(facts, instruction)
    if instruction.opcode is Opcode.FETCH:
        return [([f"host:{b}"], [b]) for b in found]
    unit = facts.units.get(instruction.unit or "")
    options: list[Operands] = [([b], [f"host:{b}"]) for b in found]
    if unit is not None and facts.plan.options.update_on_host:
        options.append(([_source(facts, unit)], [f"host:reduced:{unit.name}"]))
    return options


def _release(facts: Facts, instruction: Instruction) -> list[Operands]:
    if instruction.reads != instruction.writes:
        return []
    pools = ["weights"] if facts.plan.gathers and instruction.unit is not None else []
    return [([b], [b]) for b in pools + _movable(facts, instruction)]


def _movable(facts: Facts, instruction: Instruction) -> list[str]:
    """Buffers of the instruction's unit or micro-batch that may live on the host."""
    m, unit, found = instruction.micro_batch, instruction.unit, list[str]()
    if unit is not None:
        found += (
            [f"moments:{unit}"] if facts.joins_updates else [f"shard:{unit}", f"moments:{unit}"]
        )
    if m is not None:
        found += [f"{name}.{m}" for name in facts.tensors]
        found += [f"batch:{key}.{m}" for key in facts.batch]
        found += [f"saved:{stage.index}.{m}" for stage in facts.plan.stages]
    return found


def _compute(facts: Facts, rank: int, instruction: Instruction) -> list[Operands]:
    if instruction.stage is None or instruction.micro_batch is None:
        return []
    stage, m = facts.plan.stages[instruction.stage], instruction.micro_batch
    if stage.rank != rank:
        return []
    in_pools = facts.plan.gathers
    weights = ["weights" if in_pools else f"weights:{name}" for name in stage.units]
    saved = f"saved:{stage.index}.{m}"
    inputs = [f"{name}.{m}" for name in stage.inputs]
    inputs += [f"batch:{key}.{m}" for key in stage.batch_keys]
    if instruction.opcode is Opcode.FORWARD:
        saves = facts.trains and not stage.recompute
        outputs = [f"{name}.{m}" for name in stage.outputs]
        return [(inputs + weights, outputs + [saved] * saves)]
    if instruction.opcode is Opcode.RECOMPUTE:
        return [(inputs + weights, [saved])] if stage.recompute else []
    reads, writes = [saved, *weights], []
    reads += [
        f"batch:{name}.{m}" if name in stage.batch_keys else f"{name}.{m}"
        for name in stage.kept
        if not stage.recompute or name not in stage.outputs
    ]
    for name in (*stage.inputs, *stage.outputs):
        is_input = name in stage.inputs
        if name == "loss" or not facts.tensors[name].requires_grad:
            continue
        wanted = not (is_input and instruction.opcode is Opcode.BACKWARD_WEIGHT)
        if wanted and facts.later_readers(name, stage.index):
            reads.append(f"gradient:{name}.{m}")
        if wanted and is_input:
            writes.append(f"gradient:{name}.{m}")
    if instruction.opcode is not Opcode.BACKWARD_INPUT:
        for unit in (u for u in facts.units_of(stage) if u.trainable and u.exact):
            reads += [f"part:{unit.name}.{m}"] * (stage.index != unit.stages[-1])
            writes += [f"part:{unit.name}.{m}"] * (stage.index != unit.stages[0])
    return [(reads, writes + ["sum"] * len(sum_units(facts, instruction)))]


def _of_unit(facts: Facts, instruction: Instruction) -> list[Operands]:
    plan, unit = facts.plan, facts.units[instruction.unit or ""]
    shard, moments, reduced = (f"{k}:{unit.name}" for k in ("shard", "moments", "reduced"))
    match instruction.opcode:
        case Opcode.GATHER if facts.joins_updates:
            return [([shard], [f"weights:{unit.name}"])]
        case Opcode.GATHER:
            return [([shard], ["weights"])] if plan.gathers else []
        case Opcode.REDUCE:
            options = [(["sum"], [reduced]), (["sum", reduced], [reduced])]
            return options if plan.num_replicas > 1 else []
        case Opcode.REDUCE_TIED:
            source = reduced if plan.num_replicas > 1 else "sum"
            return [([source], [reduced])] if len(unit.ranks) > 1 else []
        case Opcode.SAVE:
            return [([shard, moments], [f"host:{shard}", f"host:{moments}"])]
    state = [shard, moments] if plan.gathers else [shard, moments, f"weights:{unit.name}"]
    verdicts = ["finite"] * plan.options.check_finite
    delayed = plan.options.clip_delayed
    scale = "clip:scale" if delayed else "scale"
    verdicts += [scale] * (plan.options.clip_norm is not None)
    squares = [f"square:{unit.name}"] * delayed
    if plan.options.update_on_host:
        state = [f"host:{buffer}" for buffer in state]
        return [([f"host:{reduced}", *state, *verdicts], [*state, *squares])]
    return [([_source(facts, unit), *state, *verdicts], [*state, *squares])]


def _source(facts: Facts, unit: Unit) -> str:
    return f"reduced:{unit.name}" if facts.is_reduced(unit) else "sum"


def _fits(facts: Facts, rank: int, buffer: str, instruction: Instruction) -> bool:
    """Whether the table's entry can hold what the instruction means to find or put there."""
    entry = facts.entry(rank, buffer)
    assert entry is not None
    kind, _, rest = buffer.removeprefix("host:").rpartition(":")
    name = rest.rpartition(".")[0]
    if kind in ("shard", "reduced"):
        unit = facts.units[rest]
        size = facts.part_elements if kind == "shard" else facts.reduced_elements
        return _is_of(entry, unit, size(unit))
    if kind == "moments":
        unit = facts.units[rest]
        slots = facts.plan.options.optimizer_slots
        trained = {p.name: p.num_elements for p in facts.plan.parameters if p.trainable}
        kept = sum(trained.get(name, 0) for name in unit.parameters)
        return _is_of(entry, unit, slots * min(kept, facts.part_elements(unit)))
    if kind == "part":
        return _computes(entry, facts.units[name], facts.units[name].num_elements)
    if kind == "saved":
        enough = math.prod(entry.shape) >= facts.plan.stages[int(name)].saved_bytes
        return entry.dtype == "uint8" and enough
    if kind == "weights" and not facts.plan.gathers:
        return _computes(entry, facts.units[rest], facts.whole_elements(facts.units[rest]))
    if kind in ("weights", "sum"):
        put = _pool_unit(facts, buffer, instruction)
        if put is None:
            return True
        dtype = put.compute_dtype if kind == "weights" and put.compute_dtype else put.dtype
        return entry.dtype == dtype and math.prod(entry.shape) >= facts.whole_elements(put)
    if buffer in ("finite", "scale") or name == "loss":
        wanted = "bool" if buffer == "finite" else "float32"
        return entry.dtype == wanted and math.prod(entry.shape) >= 1
    if kind in ("square", "clip"):
        wanted = "float64" if kind == "square" else "float32"
        return entry.dtype == wanted and math.prod(entry.shape) >= 1
    spec = facts.batch[name] if kind == "batch" else facts.tensors[name]
    return (entry.dtype, entry.shape) == (spec.dtype, spec.shape)


def _pool_unit(facts: Facts, buffer: str, instruction: Instruction) -> Unit | None:
    """The unit that the instruction itself puts into a pool buffer."""
    if instruction.opcode is Opcode.GATHER:
        return facts.units[instruction.unit or ""]
    if instruction.opcode not in BACKWARDS or buffer not in instruction.writes:
        return None
    sums = [b for b in instruction.writes if kind_of(b) == "sum"]
    return sum_units(facts, instruction)[sums.index(buffer)]


def _is_of(entry: Buffer, unit: Unit, num_elements: int) -> bool:
    """The buffer of one unit alone: as large as what it holds, as the runtime asks."""
    return entry.dtype == unit.dtype and math.prod(entry.shape) == num_elements


def _computes(entry: Buffer, unit: Unit, num_elements: int) -> bool:
    """The same of what stages compute with."""
    dtype = unit.compute_dtype if unit.compute_dtype else unit.dtype
    return entry.dtype == dtype and math.prod(entry.shape) == num_elements
