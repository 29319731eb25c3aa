"""A plan as the CSV that torch.distributed.pipelining loads: a row per rank, an action per cell.

`2F0` is the forward of stage 2 for micro-batch 0; B is backward, I and W its two halves. With
communication there are also `2SEND_F0` (stage 2 hands its outputs on), `3RECV_F0` (stage 3 takes
them), `3SEND_B0` and `2RECV_B0` for gradients, `2UNSHARD`, `2RESHARD` and `2REDUCE_GRAD`. Actions
are those of torch 2.13's `schedules.py`. This module does not import torch.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum

from planner.errors import UsageError
from planner.plan.dependencies import partial_order
from planner.plan.types import Instruction, Opcode, Plan
from planner.schedules import Schedule
from planner.simulate import simulate

__all__ = ["CsvFormat", "csv_notes", "print_csv", "torch_actions"]


class CsvFormat(StrEnum):
    """The two forms that torch's `_PipelineScheduleRuntime` loads."""

    COMPUTE_ONLY = "compute_only"
    """Compute alone: torch adds its own transfers."""
    COMPUTE_COMMS = "compute_comms"
    """With transfers, gathers and reductions as the plan has them."""


_LETTERS = {
    Opcode.FORWARD: "F",
    Opcode.BACKWARD: "B",
    Opcode.BACKWARD_INPUT: "I",
    Opcode.BACKWARD_WEIGHT: "W",
}
_LAST_HALVES = (Opcode.BACKWARD, Opcode.BACKWARD_WEIGHT)
_FIRST_HALVES = (Opcode.BACKWARD, Opcode.BACKWARD_INPUT)


def print_csv(plan: Plan, csv_format: CsvFormat) -> str:
    """The rows of `torch_actions` as CSV text.

    Raises:
        UsageError: torch's runtime cannot run such a plan.
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(torch_actions(plan, csv_format))
    return text.getvalue()


def torch_actions(plan: Plan, csv_format: CsvFormat) -> list[list[str]]:
    """Per pipeline rank: its actions in order.

    With communication, actions of all ranks are put in one order, that of the simulated times, and
    both ends of a transfer stand at its place in it. So any two ranks agree on the order of all
    transfers between them, both directions together, and no backend can make them wait in a ring.

    Raises:
        UsageError: torch's runtime cannot run such a plan.
    """
    _refuse_what_torch_cannot_run(plan)
    if csv_format is CsvFormat.COMPUTE_ONLY:
        return [
            [
                _compute_cell(instruction)
                for instruction in program
                if instruction.opcode in _LETTERS
            ]
            for program in plan.programs
        ]
    rows: list[list[str]] = [[] for _ in plan.programs]
    cells = _Cells(plan)
    for rank, index in _in_order_of_time(plan):
        for row, cell in cells.of(rank, index):
            rows[row].append(cell)
    return rows


def csv_notes(plan: Plan, csv_format: CsvFormat) -> list[str]:
    """What the CSV cannot say, or torch will do in another way: a sentence each."""
    notes = []
    if any(stage.recompute for stage in plan.stages):
        notes.append(
            "torch has no action for RECOMPUTE: wrap the stages that recompute in "
            "torch.utils.checkpoint"
        )
    if any(len(unit.stages) > 1 for unit in plan.units):
        notes.append(
            "torch does not add up the gradients of weights that stages share: do so after the step"
        )
    if plan.num_replicas > 1:
        notes.append(
            f"the CSV is one of {plan.num_replicas} replicas: in torch, FSDP or DDP joins them"
        )
    if csv_format is CsvFormat.COMPUTE_COMMS and not plan.gathers:
        notes.append("without UNSHARD and RESHARD: not for stages wrapped in FSDP")
    return notes


class _Cells:
    """The cells of each instruction, once instructions come in order of time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._last_of_hop: set[tuple[int, int]] = set()
        """SENDs and RECEIVEs after which all tensors of the hop have been named."""
        self._last_backward: set[tuple[int, int]] = set()
        self._reshards: dict[tuple[int, int], int] = {}
        """Compute cell -> stage whose weights are not needed after it until gathered again."""
        self._unsharded: set[int] = set()
        self._stages_of_unit = {unit.name: unit.stages for unit in plan.units}
        self._makers = {name: stage.index for stage in plan.stages for name in stage.outputs}
        requires_grad = {tensor.name for tensor in plan.tensors if tensor.requires_grad}
        self._lacks_gradients = {
            stage.index
            for stage in plan.stages
            if stage.index and requires_grad.isdisjoint(stage.inputs)
        }
        """Stages whose inputs have no gradient: torch sends an empty one."""
        for rank, program in enumerate(plan.programs):
            self._look_ahead(rank, program)

    def of(self, rank: int, index: int) -> Iterator[tuple[int, str]]:
        """(pipeline rank, action) for one instruction."""
        instruction = self._plan.programs[rank][index]
        opcode, stage, micro_batch = instruction.opcode, instruction.stage, instruction.micro_batch
        if opcode in _LETTERS:
            assert stage is not None
            yield rank, _compute_cell(instruction)
            if (rank, index) in self._reshards:
                self._unsharded.discard(stage)
                yield rank, f"{stage}RESHARD"
            if (rank, index) in self._last_backward:
                yield rank, f"{stage}REDUCE_GRAD"
            before = self._plan.stages[stage - 1].rank
            if opcode in _FIRST_HALVES and stage in self._lacks_gradients and before != rank:
                yield rank, f"{stage}SEND_B{micro_batch}"
                yield before, f"{stage - 1}RECV_B{micro_batch}"
        elif opcode is Opcode.GATHER:
            for user in self._stages_of_unit[instruction.unit or ""]:
                if self._plan.stages[user].rank == rank and user not in self._unsharded:
                    self._unsharded.add(user)
                    yield rank, f"{user}UNSHARD"
        elif (rank, index) in self._last_of_hop:
            yield rank, self._transfer_cell(instruction)

    def _look_ahead(self, rank: int, program: tuple[Instruction, ...]) -> None:
        """Note the last transfer of each hop, and the last use of each stage's weights."""
        last_transfer: dict[str, int] = {}
        last_backward: dict[int, int] = {}
        last_use: dict[int, int] = {}
        for index, instruction in enumerate(program):
            opcode, stage = instruction.opcode, instruction.stage
            if opcode in (Opcode.SEND, Opcode.RECEIVE):
                last_transfer[self._transfer_cell(instruction)] = index
            elif opcode is Opcode.GATHER:
                for user in self._stages_of_unit[instruction.unit or ""]:
                    if user in last_use:
                        self._reshards[rank, last_use.pop(user)] = user
            elif opcode in _LETTERS and stage is not None:
                last_use[stage] = index
                if opcode in _LAST_HALVES:
                    last_backward[stage] = index
        self._last_of_hop |= {(rank, index) for index in last_transfer.values()}
        self._last_backward |= {(rank, index) for index in last_backward.values()}
        if self._plan.gathers:
            self._reshards |= {(rank, index): stage for stage, index in last_use.items()}

    def _transfer_cell(self, instruction: Instruction) -> str:
        """The action of a SEND or RECEIVE; all tensors of a hop share it."""
        (buffer,) = instruction.reads or instruction.writes
        name, _, micro_batch = buffer.removeprefix("gradient:").rpartition(".")
        maker = self._makers[name]
        match instruction.opcode, buffer.startswith("gradient:"):
            case Opcode.SEND, False:
                return f"{maker}SEND_F{micro_batch}"
            case Opcode.SEND, True:
                return f"{maker + 1}SEND_B{micro_batch}"
            case _, False:
                return f"{maker + 1}RECV_F{micro_batch}"
            case _:
                return f"{maker}RECV_B{micro_batch}"


def _compute_cell(instruction: Instruction) -> str:
    return f"{instruction.stage}{_LETTERS[instruction.opcode]}{instruction.micro_batch}"


def _in_order_of_time(plan: Plan) -> list[tuple[int, int]]:
    """Cells of all ranks in an order that keeps the partial order; a sender right before its peer.

    Tasks that start together keep their places in a topological order.
    """
    order = partial_order(plan)
    starts: dict[tuple[int, int], float] = defaultdict(float)
    for event in simulate(plan).timeline.events:
        starts[event.rank, event.index] = event.start_seconds
    tasks = order.sorted_tasks()
    tasks.sort(key=lambda task: starts[order.members[task][0]])
    return [cell for task in tasks for cell in order.members[task]]


def _refuse_what_torch_cannot_run(plan: Plan) -> None:
    if plan.schedule is Schedule.FORWARD:
        raise UsageError(
            "a plan without backward cannot become a torch schedule",
            hint="give the plan of a training step",
        )
    for stage in plan.stages:
        before = plan.stages[stage.index - 1].outputs if stage.index else ()
        for name in stage.inputs:
            if name not in before:
                maker = next(s.index for s in plan.stages if name in s.outputs)
                raise UsageError(
                    f"stage {stage.index} reads {name} from stage {maker}: torch's runtime hands "
                    "tensors only from a stage to the next",
                    hint="plan with stages that keep both ends of the skip connection together",
                )
