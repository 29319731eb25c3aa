"""Random small changes to a plan. Some break it, some do no harm, some change nothing."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["MUTATIONS", "mutate"]

Programs = tuple[tuple[Instruction, ...], ...]
Lines = list[Instruction]
_TYPES = ("float32", "float64", "bfloat16", "int32", "uint8")


def mutate(plan: Plan, chooser: random.Random) -> tuple[str, Plan]:
    """A mutant, and the names of its one or two mutations; never equal to the plan."""
    while True:
        num_mutations = 2 if chooser.random() < 0.2 else 1
        kinds = chooser.choices(tuple(MUTATIONS), tuple(_WEIGHTS.values()), k=num_mutations)
        mutant = plan
        for kind in kinds:
            mutant = MUTATIONS[kind](mutant, chooser)
        if mutant != plan:
            return " + ".join(kinds), mutant


def _of_program(change: Callable[[Plan, int, Lines, random.Random], None]) -> "Mutation":
    """A change to the lines of one rank's program, sometimes of the evaluation's."""

    def mutation(plan: Plan, chooser: random.Random) -> Plan:
        evaluates = bool(plan.evaluation) and chooser.random() < 0.2
        programs = list(plan.evaluation if evaluates else plan.programs)
        rank = chooser.randrange(len(programs))
        lines = list(programs[rank])
        if not lines:
            return plan
        change(plan, rank, lines, chooser)
        programs[rank] = tuple(lines)
        changed = tuple(programs)
        return replace(plan, evaluation=changed) if evaluates else replace(plan, programs=changed)

    return mutation


def _drop(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    del lines[chooser.randrange(len(lines))]


def _duplicate(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    line = chooser.choice(lines)
    place = lines.index(line) + 1
    lines.insert(place if chooser.random() < 0.5 else chooser.randint(place, len(lines)), line)


def _swap_neighbours(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    place = chooser.randrange(len(lines))
    lines[place - 1 : place + 1] = reversed(lines[place - 1 : place + 1])


def _swap_far(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    _exchange(lines, range(len(lines)), chooser)


def _swap_collectives(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    _exchange(lines, [i for i, line in enumerate(lines) if line.stream == "data"], chooser)


def _exchange(lines: Lines, places: Sequence[int], chooser: random.Random) -> None:
    if len(places) > 1:
        one, other = chooser.sample(places, 2)
        lines[one], lines[other] = lines[other], lines[one]


def _move(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    line = lines.pop(chooser.randrange(len(lines)))
    lines.insert(chooser.randint(0, len(lines)), line)


def _move_near(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    place = chooser.randrange(len(lines))
    line = lines.pop(place)
    lines.insert(max(0, place + chooser.choice((-4, -3, -2, 2, 3, 4))), line)


def _retarget(plan: Plan, _: int, lines: Lines, chooser: random.Random) -> None:
    """Another stage, unit or micro-batch; for a micro-batch sometimes in the names as well."""
    place = chooser.randrange(len(lines))
    line = lines[place]
    choices: dict[str, Sequence[int | str]] = {
        "stage": range(plan.num_stages),
        "unit": [unit.name for unit in plan.units],
        "micro_batch": range(plan.num_micro_batches),
    }
    fields = [field for field in choices if getattr(line, field) is not None]
    if not fields:
        return
    field = chooser.choice(fields)
    value = chooser.choice(choices[field])
    if field == "micro_batch" and chooser.random() < 0.5:
        line = _of_micro_batch(line, int(value))
    lines[place] = replace(line, **{field: value})  # type: ignore[arg-type]


def _of_micro_batch(line: Instruction, micro_batch: int) -> Instruction:
    """The same instruction for another micro-batch: its sums and weights stay."""
    old, new = f".{line.micro_batch}", f".{micro_batch}"
    pools = ("sum:", "weights:", "shard:", "moments:", "reduced:")
    reads, writes = (
        tuple(
            b.removesuffix(old) + new if b.endswith(old) and not b.startswith(pools) else b
            for b in buffers
        )
        for buffers in (line.reads, line.writes)
    )
    return replace(line, micro_batch=micro_batch, reads=reads, writes=writes)


def _micro_batches(plan: Plan, chooser: random.Random) -> Plan:
    """Two micro-batches change places on every rank: in forward, in backward, or in both."""
    one, other = (chooser.randrange(plan.num_micro_batches) for _ in range(2))
    exchange = {one: other, other: one}
    phases = chooser.choice(((True,), (False,), (True, False)))

    def changed(line: Instruction) -> Instruction:
        if line.micro_batch not in exchange or _is_forward(line) not in phases:
            return line
        return _of_micro_batch(line, exchange[line.micro_batch])

    evaluates = bool(plan.evaluation) and chooser.random() < 0.2
    programs = plan.evaluation if evaluates else plan.programs
    changes = tuple(tuple(map(changed, program)) for program in programs)
    return replace(plan, evaluation=changes) if evaluates else replace(plan, programs=changes)


def _is_forward(line: Instruction) -> bool:
    carries_gradient = any(b.startswith("gradient:") for b in (*line.reads, *line.writes))
    forward = (Opcode.LOAD, Opcode.FORWARD, Opcode.SEND, Opcode.RECEIVE, Opcode.EVICT)
    return line.opcode in forward and not carries_gradient


def _rename(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    """Another of the rank's buffers among the reads or writes, or one less, or one more."""
    names = sorted({buffer for line in lines for buffer in (*line.reads, *line.writes)})
    place = chooser.randrange(len(lines))
    field = chooser.choice(("reads", "writes"))
    buffers = list(getattr(lines[place], field))
    what = chooser.random()
    if buffers and what < 0.8:
        position = chooser.randrange(len(buffers))
        buffers[position : position + 1] = [chooser.choice(names)] if what < 0.6 else []
    else:
        buffers.append(chooser.choice(names))
    lines[place] = replace(lines[place], **{field: tuple(buffers)})  # type: ignore[arg-type]


def _rename_pool(_: Plan, __: int, lines: Lines, chooser: random.Random) -> None:
    """Another weights or sum buffer for everything from one instruction on, up to another."""
    names = {b for line in lines for b in (*line.reads, *line.writes)}
    pools = sorted(b for b in names if b.startswith(("weights:", "sum:")))
    if len(pools) < 2:
        return
    old, new = chooser.sample(pools, 2)
    first, last = sorted(chooser.choices(range(len(lines)), k=2))
    for place in range(first, last + 1):
        reads, writes = (
            tuple(new if buffer == old else buffer for buffer in buffers)
            for buffers in (lines[place].reads, lines[place].writes)
        )
        lines[place] = replace(lines[place], reads=reads, writes=writes)


def _change_peer(plan: Plan, _: int, lines: Lines, chooser: random.Random) -> None:
    places = [i for i, line in enumerate(lines) if line.peer is not None]
    if places:
        place, peer = chooser.choice(places), chooser.randrange(plan.num_pipeline_ranks)
        towards = "to" if lines[place].opcode is Opcode.SEND else "from"
        lines[place] = replace(lines[place], peer=peer, stream=f"{towards}.{peer}")


def _transfers(plan: Plan, chooser: random.Random) -> Plan:
    """Two transfers between two ranks exchanged, or one dropped or doubled, at both ends alike."""
    calls: dict[tuple[int, int], list[int]] = {}
    for rank, program in enumerate(plan.programs):
        for index, line in enumerate(program):
            if line.opcode is Opcode.SEND and line.peer is not None:
                calls.setdefault((rank, line.peer), []).append(index)
    if not calls:
        return plan
    (sender, receiver), sends = chooser.choice(sorted(calls.items()))
    receives = [
        index
        for index, line in enumerate(plan.programs[receiver])
        if line.opcode is Opcode.RECEIVE and line.peer == sender
    ]
    one, other = sorted(chooser.choices(range(len(sends)), k=2))
    programs = list(plan.programs)
    what = chooser.choice(("exchange", "drop", "double"))
    for rank, places in ((sender, sends), (receiver, receives)):
        if other >= len(places):
            return plan  # the first of two mutations has broken the pair
        lines = list(programs[rank])
        if what == "exchange":
            lines[places[one]], lines[places[other]] = lines[places[other]], lines[places[one]]
        elif what == "drop":
            del lines[places[one]]
        else:
            lines.insert(places[other] + 1, lines[places[one]])
        programs[rank] = tuple(lines)
    return replace(plan, programs=tuple(programs))


def _collectives(plan: Plan, chooser: random.Random) -> Plan:
    """Two instructions of the data stream exchanged on every rank that has both."""
    names = sorted(
        {(i.opcode, i.unit or "") for p in plan.programs for i in p if i.stream == "data"}
    )
    if len(names) < 2:
        return plan
    one, other = chooser.sample(names, 2)
    programs = []
    for program in plan.programs:
        lines = list(program)
        found = [(line.opcode, line.unit or "") for line in lines]
        if one in found and other in found:
            first, second = found.index(one), found.index(other)
            lines[first], lines[second] = lines[second], lines[first]
        programs.append(tuple(lines))
    return replace(plan, programs=tuple(programs))


def _shrink_buffer(plan: Plan, chooser: random.Random) -> Plan:
    return _with_entry(plan, chooser, lambda shape: chooser.choice((shape - 1, shape // 2)))


def _grow_buffer(plan: Plan, chooser: random.Random) -> Plan:
    return _with_entry(plan, chooser, lambda shape: shape + chooser.randint(1, 3))


def _with_entry(plan: Plan, chooser: random.Random, change: Callable[[int], int]) -> Plan:
    """One dimension of one entry of a rank's table of buffers changed."""
    rank = chooser.randrange(len(plan.buffers))
    table = list(plan.buffers[rank])
    places = [place for place, entry in enumerate(table) if entry.shape]
    if not places:
        return plan
    place = chooser.choice(places)
    shape = list(table[place].shape)
    axis = chooser.randrange(len(shape))
    shape[axis] = max(0, change(shape[axis]))
    table[place] = replace(table[place], shape=tuple(shape))
    return _with_table(plan, rank, tuple(table))


def _change_type(plan: Plan, chooser: random.Random) -> Plan:
    rank = chooser.randrange(len(plan.buffers))
    table = list(plan.buffers[rank])
    if not table:
        return plan
    place = chooser.randrange(len(table))
    table[place] = replace(table[place], dtype=chooser.choice(_TYPES))
    return _with_table(plan, rank, tuple(table))


def _change_tensor(plan: Plan, chooser: random.Random) -> Plan:
    """A boundary tensor itself gets another shape or type; the tables of buffers stay."""
    if not plan.tensors:
        return plan
    tensors = list(plan.tensors)
    place = chooser.randrange(len(tensors))
    spec = tensors[place]
    if chooser.random() < 0.5:
        tensors[place] = replace(spec, dtype=chooser.choice(_TYPES))
    else:
        tensors[place] = replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] + 1))
    return replace(plan, tensors=tuple(tensors))


def _with_table(plan: Plan, rank: int, table: tuple[object, ...]) -> Plan:
    return replace(plan, buffers=(*plan.buffers[:rank], table, *plan.buffers[rank + 1 :]))  # type: ignore[arg-type]


Mutation = Callable[[Plan, random.Random], Plan]

MUTATIONS: dict[str, Mutation] = {
    "drop": _of_program(_drop),
    "duplicate": _of_program(_duplicate),
    "swap neighbours": _of_program(_swap_neighbours),
    "swap far": _of_program(_swap_far),
    "swap collectives": _of_program(_swap_collectives),
    "move": _of_program(_move),
    "move near": _of_program(_move_near),
    "retarget": _of_program(_retarget),
    "rename": _of_program(_rename),
    "rename pool": _of_program(_rename_pool),
    "change peer": _of_program(_change_peer),
    "micro-batches": _micro_batches,
    "transfers": _transfers,
    "collectives": _collectives,
    "shrink buffer": _shrink_buffer,
    "grow buffer": _grow_buffer,
    "change type": _change_type,
    "change tensor": _change_tensor,
}

_WEIGHTS = dict.fromkeys(MUTATIONS, 2) | {
    # What moves instructions is oftenest harmless, and hardest to judge.
    **dict.fromkeys(("swap neighbours", "move near"), 6),
    **dict.fromkeys(("duplicate", "move", "transfers", "collectives", "swap collectives"), 4),
    # Any judge sees through these.
    **dict.fromkeys(("change peer", "change type", "change tensor"), 1),
}
