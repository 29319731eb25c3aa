"""Every instruction as an operation on symbols: what it must find, what it leaves.

A content is a tuple: ("value", buffer) for what the buffer's name says; ("state", unit) and
("updated", unit) for shard, moments and weights before and after UPDATE; ("weights", unit);
("torn", unit) for whole weights of which a replica has updated its own part;
("gradient", tensor, micro-batch, stages that have added to it); and ("part" | "sum" | "reduced"
| "leaving", unit, contributions), a contribution being (stage, micro-batch) and their order that of
adding; what is leaving is on the host.
"""

from collections.abc import Iterable, Sequence

from oracle.facts import BACKWARDS, COMPUTE, Facts, kind_of
from oracle.signatures import sum_units
from planner.plan.types import Instruction, Opcode, StagePlan, Unit

__all__ = ["Content", "Wrong", "collect", "operate"]

Content = tuple[object, ...]
Held = dict[str, Content]
Added = tuple[tuple[int, int], ...]


class Wrong(Exception):  # noqa: N818 - a finding, not an error of the program
    """An instruction does not find what it needs. `args`: kind of fault, message."""


def operate(facts: Facts, rank: int, instruction: Instruction, held: Held) -> Held:
    """What the instruction will have written; what it spends or releases goes from `held`.

    Raises:
        Wrong: it reads a buffer that does not hold what it needs.
    """
    for buffer in instruction.reads:
        if buffer not in held:
            raise Wrong("race", f"{instruction.opcode} reads {buffer}, which holds nothing")
    if instruction.opcode in COMPUTE and instruction.stage is not None:
        return _compute(facts, instruction, facts.plan.stages[instruction.stage], held)
    match instruction.opcode:
        case Opcode.RECEIVE:
            return {}
        case Opcode.LOAD:
            return _named(instruction.writes)
        case Opcode.EVICT if kind_of(instruction.writes[0].removeprefix("host:")) == "reduced":
            return _gradient_leaves(facts, instruction, held)
        case Opcode.SEND | Opcode.FETCH | Opcode.EVICT:
            (source,) = instruction.reads
            return dict.fromkeys(instruction.writes or ("sent",), held[source])
        case Opcode.RELEASE:
            (released,) = instruction.reads
            if kind_of(released) == "weights":
                _need(held, released, ("weights", instruction.unit))
            del held[released]
            return {}
        case Opcode.CLIP if facts.plan.options.clip_delayed:
            for buffer in instruction.reads:
                _need(held, buffer, ("value", buffer))
            return _named(instruction.writes)
        case Opcode.CHECK_FINITE | Opcode.CLIP:
            for unit in facts.trainable_on(rank):
                _whole_gradient(facts, unit, instruction, held)
            return _named(instruction.writes)
    return _of_unit(facts, facts.units[instruction.unit or ""], instruction, held)


def collect(instructions: Sequence[Instruction], made: Sequence[Held]) -> list[Held]:
    """What each rank's buffers hold when a transfer or collective of theirs is over.

    Raises:
        Wrong: sender and receiver name different buffers.
    """
    first = instructions[0]
    if first.opcode is Opcode.SEND:
        if first.reads != instructions[1].writes:
            raise Wrong("transfer", f"{first} meets {instructions[1]}")
        return [{}, dict.fromkeys(first.reads, made[0]["sent"])]
    if first.opcode is Opcode.REDUCE_TIED:
        (buffer,) = first.writes
        added = [c for contents in made for c in _added(contents[buffer])]
        return [{buffer: ("reduced", first.unit, tuple(added))} for _ in made]
    return list(made)


def _of_unit(facts: Facts, unit: Unit, instruction: Instruction, held: Held) -> Held:
    shard, moments = f"shard:{unit.name}", f"moments:{unit.name}"
    match instruction.opcode:
        case Opcode.GATHER if facts.joins_updates:
            _need(held, shard, ("updated", unit.name))
            return dict.fromkeys(instruction.writes, ("updated", unit.name))
        case Opcode.GATHER:
            _need(held, shard, ("state", unit.name))
            return dict.fromkeys(instruction.writes, ("weights", unit.name))
        case Opcode.SAVE:
            _need(held, shard, ("updated", unit.name))
            _need(held, moments, ("updated", unit.name))
            return dict.fromkeys(instruction.writes, ("updated", unit.name))
        case Opcode.REDUCE | Opcode.REDUCE_TIED:
            added: Added = ()
            for buffer in sorted(instruction.reads):  # what was reduced before stands first
                added += _take(held, buffer, unit)
            return dict.fromkeys(instruction.writes, ("reduced", unit.name, added))
    place = "host:" if facts.plan.options.update_on_host else ""
    for buffer in (shard, moments):
        _need(held, place + buffer, ("state", unit.name))
    if not facts.plan.gathers:
        _need(held, f"weights:{unit.name}", ("weights", unit.name))
    del held[_whole_gradient(facts, unit, instruction, held)]
    made: Held = dict.fromkeys(instruction.writes, ("updated", unit.name))
    if facts.plan.options.clip_delayed:
        made |= _named([f"square:{unit.name}"])
    if facts.joins_updates:
        made[f"weights:{unit.name}"] = ("torn", unit.name)
    return made


def _compute(facts: Facts, instruction: Instruction, stage: StagePlan, held: Held) -> Held:
    found = sorted(held[b] for b in instruction.reads if kind_of(b) == "weights")
    if found != sorted(("weights", name) for name in stage.units):
        raise Wrong("race", f"{instruction.opcode} of stage {stage.index} finds weights {found}")
    for buffer in instruction.reads:
        if kind_of(buffer) in ("", "batch", "saved"):
            _need(held, buffer, ("value", buffer))
    if instruction.opcode in BACKWARDS:
        return _backward(facts, instruction, stage, held)
    return _named(instruction.writes)


def _backward(facts: Facts, instruction: Instruction, stage: StagePlan, held: Held) -> Held:
    m, made = instruction.micro_batch or 0, Held()
    for name in (*stage.inputs, *stage.outputs):
        buffer, later = f"gradient:{name}.{m}", facts.later_readers(name, stage.index)
        if buffer in instruction.reads:
            _need(held, buffer, ("gradient", name, m, later))
        if buffer in instruction.writes:
            made[buffer] = ("gradient", name, m, (*later, stage.index))
    if instruction.opcode is Opcode.BACKWARD_INPUT:
        return made
    sums = [buffer for buffer in instruction.writes if kind_of(buffer) == "sum"]
    buffers = {u.name: b for u, b in zip(sum_units(facts, instruction), sums, strict=True)}
    for unit in (u for u in facts.units_of(stage) if u.trainable):
        part = f"part:{unit.name}.{m}"
        added: Added = ((stage.index, m),)
        if part in instruction.reads:
            before: Added = tuple((s, m) for s in reversed(unit.stages) if s > stage.index)
            _need(held, part, ("part", unit.name, before))
            added = before + added
        if part in instruction.writes:
            made[part] = ("part", unit.name, added)
        else:
            made[buffers[unit.name]] = _sum(instruction, unit, buffers[unit.name], added, held)
    return made


def _sum(instruction: Instruction, unit: Unit, buffer: str, added: Added, held: Held) -> Content:
    """The sum after a backward: started where the backward does not read it."""
    before: Added = ()
    if buffer in instruction.reads:
        before = _take(held, buffer, unit)
    elif buffer in held:
        raise Wrong("gradient", f"{buffer} is overwritten while it holds {held[buffer]}")
    for stage, m in added:
        if any(other == stage and earlier >= m for other, earlier in before):
            raise Wrong("order", f"{buffer}: {(stage, m)} is added after {before}")
    return ("sum", unit.name, before + added)


def _whole_gradient(facts: Facts, unit: Unit, instruction: Instruction, held: Held) -> str:
    """The buffer with the unit's gradient: of every stage and micro-batch, each once."""
    kind = "reduced" if facts.is_reduced(unit) else "sum"
    if facts.plan.options.update_on_host and instruction.opcode is Opcode.UPDATE:
        kind = "leaving"
    wanted = [(s, m) for s in unit.stages for m in range(facts.plan.num_micro_batches)]
    for buffer in instruction.reads:
        if held[buffer][:2] == (kind, unit.name):
            if sorted(_added(held[buffer])) != wanted:
                raise Wrong("gradient", f"{instruction.opcode} finds {held[buffer]}")
            return buffer
    raise Wrong("gradient", f"{instruction.opcode} finds no gradient of {unit.name}")


def _gradient_leaves(facts: Facts, instruction: Instruction, held: Held) -> Held:
    """What has been added so far; it stays for verdicts that wait for all gradients."""
    unit, (source,) = facts.units[instruction.unit or ""], instruction.reads
    before = held[source]
    added = _take(held, source, unit)
    options = facts.plan.options
    if options.check_finite or (options.clip_norm is not None and not options.clip_delayed):
        held[source] = before
    return dict.fromkeys(instruction.writes, ("leaving", unit.name, added))


def _take(held: Held, buffer: str, unit: Unit) -> Added:
    """The contributions in a sum or reduced gradient, which is spent."""
    if held[buffer][1] != unit.name:
        raise Wrong("gradient", f"{buffer} holds {held[buffer]}, nothing of {unit.name}")
    return _added(held.pop(buffer))


def _added(content: Content) -> Added:
    contributions = content[2]
    assert isinstance(contributions, tuple)
    return contributions


def _need(held: Held, buffer: str, content: Content) -> None:
    if held[buffer] != content:
        raise Wrong("race", f"{buffer} holds {held[buffer]} instead of {content}")


def _named(buffers: Iterable[str]) -> Held:
    return {buffer: ("value", buffer) for buffer in buffers}
