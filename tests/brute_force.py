"""A second reading of a plan, sharing no code with the checker: run it on whole numbers.

Every layer multiplies the sum of its inputs by its parameters, exactly, so a wrong, missing or
doubled gradient shows in the updated weights. Instructions start in random order among those that
may: their stream's predecessor is over, so is every earlier instruction of the rank with a
conflicting use of a buffer, and so is every earlier compute instruction. Both ends of a transfer
start together. Replicas see the same data, so a reduction multiplies by their number.
"""

import math
import random

from planner.plan.types import Instruction, Opcode, Plan

__all__ = ["StuckError", "plain_weights", "planned_weights"]


class StuckError(Exception):
    """The plan cannot be run to its end, or reads what nothing wrote."""


def start_weights(plan: Plan) -> dict[str, int]:
    """A different prime-like number for each parameter."""
    return {parameter.name: 3 + 2 * i for i, parameter in enumerate(plan.parameters)}


def batch_value(micro_batch: int) -> int:
    return 10 + 7 * micro_batch


def plain_weights(plan: Plan) -> dict[str, int]:
    """Weights after one step of plain accumulation: weight - gradient."""
    weights = start_weights(plan)
    gradients = dict.fromkeys(weights, 0)
    parameters = {unit.name: unit.parameters for unit in plan.units}
    for micro_batch in range(plan.num_micro_batches):
        values: dict[str, int] = {}
        for stage in plan.stages:
            total = sum(values[name] for name in stage.inputs)
            total += batch_value(micro_batch) * len(stage.batch_keys)
            product = math.prod(weights[p] for u in stage.units for p in parameters[u])
            values.update(dict.fromkeys(stage.outputs, total * product))
        errors = {"loss": 1}
        for stage in reversed(plan.stages):
            names = [p for u in stage.units for p in parameters[u]]
            error = sum(errors[name] for name in stage.outputs)
            total = sum(values[name] for name in stage.inputs)
            total += batch_value(micro_batch) * len(stage.batch_keys)
            for name in names:
                others = math.prod(weights[other] for other in names if other != name)
                gradients[name] += error * total * others
            for name in stage.inputs:
                back = error * math.prod(weights[p] for p in names)
                errors[name] = errors.get(name, 0) + back
    return {name: weights[name] - plan.num_replicas * gradients[name] for name in weights}


def planned_weights(plan: Plan, seed: int) -> list[dict[str, int]]:
    """Weights on each pipeline rank after the plan has run once, in an order drawn from `seed`.

    Raises:
        StuckError: nothing can start, or something is missing where it is read.
    """
    machine = _Machine(plan)
    chooser = random.Random(seed)
    while machine.pending:
        ready = machine.ready()
        if not ready:
            raise StuckError("deadlock")
        task = chooser.choice(ready)
        try:
            machine.execute(task)
        except (LookupError, TypeError, ValueError, StopIteration) as error:
            raise StuckError(f"{task}: {error!r}") from None
    return [
        {p: v for (name, p), v in machine.state[rank].items() if name == "weight"}
        for rank in range(plan.num_pipeline_ranks)
    ]


class _Machine:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.units = {unit.name: unit for unit in plan.units}
        weights = start_weights(plan)
        self.buffers: list[dict[str, object]] = [{} for _ in plan.programs]
        self.state: list[dict[tuple[str, str], int]] = []
        for rank in range(plan.num_pipeline_ranks):
            mine = [unit for unit in plan.units if rank in unit.ranks]
            self.state.append({("weight", p): weights[p] for u in mine for p in u.parameters})
            for unit in mine:
                values = {p: weights[p] for p in unit.parameters}
                self.buffers[rank][f"shard:{unit.name}"] = values
                if not plan.partition:
                    self.buffers[rank][f"weights:{unit.name}"] = values
        self.done: set[tuple[int, int]] = set()
        self.pending = {
            (r, i) for r, program in enumerate(plan.programs) for i in range(len(program))
        }
        self.waits = {
            (rank, index): [
                (rank, earlier)
                for earlier in range(index)
                if _conflict(program[earlier], program[index])
            ]
            for rank, program in enumerate(plan.programs)
            for index in range(len(program))
        }
        self.calls: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for rank, program in enumerate(plan.programs):
            for index, instruction in enumerate(program):
                self.calls.setdefault((rank, instruction.opcode, _partner(instruction)), []).append(
                    (rank, index)
                )

    def instruction(self, cell: tuple[int, int]) -> Instruction:
        return self.plan.programs[cell[0]][cell[1]]

    def ends(self, cell: tuple[int, int]) -> list[tuple[int, int]] | None:
        """All instructions that start with this one; None where one is missing."""
        rank, instruction = cell[0], self.instruction(cell)
        match instruction.opcode:
            case Opcode.SEND | Opcode.RECEIVE:
                other = Opcode.RECEIVE if instruction.opcode is Opcode.SEND else Opcode.SEND
                ranks = [
                    (rank, instruction.opcode, instruction.peer),
                    (instruction.peer, other, rank),
                ]
            case Opcode.REDUCE_TIED:
                holders = self.units[instruction.unit or ""].ranks
                ranks = [(r, instruction.opcode, instruction.unit) for r in holders]
            case _:
                return [cell]
        position = self.calls[ranks[0] if rank == ranks[0][0] else (rank, *ranks[0][1:])].index(
            cell
        )
        calls = [self.calls.get(key, []) for key in ranks]
        if any(len(found) <= position for found in calls):
            return None
        return [found[position] for found in calls]

    def ready(self) -> list[tuple[tuple[int, int], ...]]:
        free = {cell for cell in self.pending if all(w in self.done for w in self.waits[cell])}
        tasks = set()
        for cell in free:
            ends = self.ends(cell)
            if ends and all(end in free for end in ends):
                tasks.add(tuple(sorted(ends)))
        return sorted(tasks)

    def execute(self, task: tuple[tuple[int, int], ...]) -> None:
        first = self.instruction(task[0])
        if first.opcode in (Opcode.SEND, Opcode.RECEIVE):
            (source,) = (c for c in task if self.instruction(c).opcode is Opcode.SEND)
            (target,) = (c for c in task if self.instruction(c).opcode is Opcode.RECEIVE)
            (read,), (written,) = self.instruction(source).reads, self.instruction(target).writes
            self.buffers[target[0]][written] = self.buffers[source[0]][read]
        elif first.opcode is Opcode.REDUCE_TIED:
            sums = []
            for rank, index in task:
                buffers, reads = self.buffers[rank], self.plan.programs[rank][index].reads
                sums.append(buffers[reads[0]])
            total = {p: sum(part[p] for part in sums) for p in sums[0]}
            for rank, _ in task:
                self.buffers[rank][f"reduced:{first.unit}"] = total
        else:
            self.run_one(task[0][0], first)
        self.pending.difference_update(task)
        self.done.update(task)

    def run_one(self, rank: int, instruction: Instruction) -> None:
        buffers, unit = self.buffers[rank], self.units.get(instruction.unit or "")
        match instruction.opcode:
            case Opcode.LOAD:
                for name in instruction.writes:
                    buffers[name] = batch_value(int(name.rpartition(".")[2]))
            case Opcode.GATHER:
                (target,) = instruction.writes
                buffers[target] = dict(buffers[instruction.reads[0]])
            case Opcode.RELEASE:
                del buffers[instruction.reads[0]]
            case Opcode.REDUCE:
                total = buffers[instruction.reads[0]]
                replicas = self.plan.num_replicas
                buffers[instruction.writes[0]] = {p: replicas * total[p] for p in unit.parameters}
            case Opcode.UPDATE:
                gradient = buffers[next(r for r in instruction.reads if r[:3] in ("sum", "red"))]
                fresh = {p: self.state[rank]["weight", p] - gradient[p] for p in unit.parameters}
                for name in instruction.writes:
                    buffers[name] = fresh
                self.state[rank].update({("weight", p): v for p, v in fresh.items()})
            case _:
                self.compute(rank, instruction)

    def compute(self, rank: int, instruction: Instruction) -> None:
        buffers, m = self.buffers[rank], instruction.micro_batch
        stage = self.plan.stages[instruction.stage]
        weights: dict[str, int] = {}
        for name in instruction.reads:
            value = buffers[name]
            if name.startswith("weights:"):
                weights.update(value)
        names = [p for u in stage.units for p in self.units[u].parameters]
        product = math.prod(weights[p] for p in names)
        if instruction.opcode is not Opcode.BACKWARD:
            needed = [f"{n}.{m}" for n in stage.inputs] + [
                f"batch:{k}.{m}" for k in stage.batch_keys
            ]
            if set(needed) - set(instruction.reads):
                raise ValueError("an input is not read")
            total = sum(buffers[name] for name in needed)
            for name in instruction.writes:
                buffers[name] = total if name.startswith("saved:") else total * product
            return
        total = buffers[f"saved:{stage.index}.{m}"]
        outputs = [f"gradient:{n}.{m}" for n in stage.outputs if n != "loss"]
        error = sum(buffers[name] for name in outputs) + ("loss" in stage.outputs)
        if set(outputs) - set(instruction.reads):
            raise ValueError("an output gradient is not read")
        for name in (f"gradient:{n}.{m}" for n in stage.inputs):
            known = buffers[name] if name in instruction.reads else 0
            if name not in instruction.writes:
                raise ValueError("an input gradient is not written")
            buffers[name] = known + error * product
        for unit in (self.units[u] for u in stage.units):
            gradient = {
                p: error * total * math.prod(weights[o] for o in names if o != p)
                for p in unit.parameters
            }
            self.accumulate(buffers, instruction, unit.name, m, gradient)

    def accumulate(
        self,
        buffers: dict[str, object],
        instruction: Instruction,
        unit: str,
        m: int,
        gradient: dict[str, int],
    ) -> None:
        part = f"part:{unit}.{m}"
        if part in instruction.reads:
            gradient = {p: v + buffers[part][p] for p, v in gradient.items()}
        if part in instruction.writes:
            buffers[part] = gradient
            return
        tied = f"sum:{unit}." if len(self.units[unit].stages) > 1 else "sum:float32."
        (target,) = (name for name in instruction.writes if name.startswith(tied))
        if target in instruction.reads:
            gradient = {p: v + buffers[target][p] for p, v in gradient.items()}
        buffers[target] = gradient


def _partner(instruction: Instruction) -> object:
    is_transfer = instruction.opcode in (Opcode.SEND, Opcode.RECEIVE)
    return instruction.peer if is_transfer else instruction.unit


def _conflict(one: Instruction, other: Instruction) -> bool:
    return (
        one.stream == other.stream
        or one.stream == "compute"
        or bool(set(one.writes) & {*other.reads, *other.writes})
        or bool(set(one.reads) & set(other.writes))
    )
