"""What buffers hold when a plan runs on symbols instead of numbers, and what was found wrong.

A symbol is a tuple: ("named", buffer) for what its name says; ("weights", unit); ("state", unit)
and ("updated", unit) for a shard before and after its update; ("gradient", tensor, micro-batch,
stages that have added to it); ("part", unit, micro-batch, stages); ("reduced", unit, ranks).
"""

from collections import Counter
from dataclasses import dataclass, field

from planner.check.types import Cell, Failure
from planner.plan.types import Instruction, Plan, Unit

__all__ = ["Content", "State", "Sum", "words"]

Content = tuple[object, ...]


@dataclass(slots=True, kw_only=True)
class Sum:
    """What an accumulation buffer holds."""

    unit: str
    added: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(stage, micro-batch) whose gradient was added -> how often."""
    consumed: bool = False
    """Whether a reduction or an update has taken it."""


@dataclass(slots=True, kw_only=True)
class State:
    """All buffers of all pipeline ranks, and what has happened so far."""

    plan: Plan
    held: list[dict[str, Content]]
    sums: list[dict[str, Sum]]
    units: dict[str, Unit]
    readers: dict[str, tuple[int, ...]]
    """Boundary tensor -> stages that read it, ascending."""
    cells: tuple[Cell, ...] = ()
    """Of the task that runs."""
    num_reduced: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(unit, rank) -> how often; likewise below."""
    num_tied: Counter[tuple[str, int]] = field(default_factory=Counter)
    num_updated: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: dict[int, Failure] = field(default_factory=dict)
    """The first failure of each rule."""

    @classmethod
    def at_start(cls, plan: Plan) -> "State":
        """Every rank holds the state of its units, and nothing else."""
        readers: dict[str, list[int]] = {tensor.name: [] for tensor in plan.tensors}
        for stage in plan.stages:
            for name in stage.inputs:
                readers[name].append(stage.index)
        held: list[dict[str, Content]] = [{} for _ in plan.programs]
        for unit in plan.units:
            for rank in unit.ranks:
                held[rank][f"shard:{unit.name}"] = ("state", unit.name)
                if not plan.partition:
                    held[rank][f"weights:{unit.name}"] = ("weights", unit.name)
        return cls(
            plan=plan,
            held=held,
            sums=[{} for _ in plan.programs],
            units={unit.name: unit for unit in plan.units},
            readers={name: tuple(stages) for name, stages in readers.items()},
        )

    def fail(self, rule: int, message: str) -> None:
        """Note that the running task breaks a rule."""
        self.failures.setdefault(rule, Failure(message=message, cells=self.cells))

    def need(self, rank: int, instruction: Instruction, buffer: str, content: Content) -> None:
        """The instruction reads `buffer` and finds `content` in it."""
        found = self.held[rank].get(buffer)
        if buffer not in instruction.reads:
            self.fail(5, f"{instruction.opcode.value} does not read {buffer}, which it needs")
        elif found is not None and found != content:
            self.fail(5, f"{buffer} holds {words(found)} where {words(content)} is needed")

    def find_reads(self) -> None:
        """Whatever the running task reads has been written."""
        for rank, index in self.cells:
            for buffer in self.plan.programs[rank][index].reads:
                if buffer not in self.held[rank] and buffer not in self.sums[rank]:
                    self.fail(5, f"rank {rank} reads {buffer} before anything has written it")


def words(content: Content) -> str:
    """A content, for messages."""
    match content:
        case ("named", buffer):
            return str(buffer)
        case ("gradient", tensor, micro_batch, stages):
            return f"the gradient of {tensor}.{micro_batch} from stages {stages}"
        case (kind, *rest):
            return " ".join(map(str, (kind, *rest)))
    return "nothing"
