"""What buffers hold when a plan runs on symbols instead of numbers, and what was found wrong.

A buffer that is named for its content (tensors, batch keys, saved) holds NAMED or nothing. A
gradient or part holds the number of the stage that added to it last, which says that all later
ones have, because each stage finds what the next one left. Weights hold their unit's name, state
STATE or UPDATED, sums and reduced gradients a Gradient. Host copies hold what was copied. Weights
in place of which a replica has updated its own part are MIXED until the parts are gathered.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.check.expected import Expected
from planner.check.types import Cell, Failure
from planner.plan.names import buffer_key
from planner.plan.types import Instruction, Plan

__all__ = [
    "MIXED", "NAMED", "STATE", "UPDATED", "Content", "Gradient", "State", "describe", "words"
]  # fmt: skip

NAMED = True
STATE = "the state before its update"
UPDATED = "the updated state"
MIXED = "weights that are updated in this replica's part alone"


@dataclass(slots=True, kw_only=True)
class Gradient:
    """What a sum or reduced buffer holds."""

    unit: str
    added: dict[int, list[int]] = field(default_factory=dict)
    """Stage -> micro-batches whose gradients were added, in that order."""

    def copy(self) -> "Gradient":
        return Gradient(unit=self.unit, added={s: list(found) for s, found in self.added.items()})

    def take(self, other: "Gradient") -> None:
        """Add all of another."""
        for stage, found in other.added.items():
            self.added.setdefault(stage, []).extend(found)

    def fault(self, stages: Iterable[int], num_micro_batches: int) -> str:
        """The first (stage, micro-batch) that was not added exactly once."""
        for stage in stages:
            found = self.added.get(stage, [])
            if len(found) == num_micro_batches == len(set(found)):
                continue
            times = Counter(found)
            micro_batch = next(m for m in range(num_micro_batches) if times[m] != 1)
            return (
                f"the gradient of stage {stage}, micro-batch {micro_batch} added "
                f"{times[micro_batch]} times instead of once"
            )
        return ""


Content = bool | int | str | Gradient


class State:
    """All buffers of all pipeline ranks, and what has happened so far."""

    def __init__(self, plan: Plan) -> None:
        """Every rank holds the state of its units, on the device or on the host, and no more."""
        self.plan = plan
        self.expected = Expected(plan)
        self.cells: tuple[Cell, ...] = ()
        """Of the task that runs."""
        self.failures: dict[int, Failure] = {}
        """The first failure of each rule."""
        self.held: list[dict[str, Content]] = [{} for _ in plan.programs]
        places = {kind: "host:" if kind in plan.offloaded else "" for kind in ("shard", "moments")}
        for held in self.held if plan.options.clip_delayed else ():
            held["clip:scale"] = NAMED
        for unit in plan.units:
            for rank in unit.ranks:
                for kind, place in places.items():
                    self.held[rank][f"{place}{kind}:{unit.name}"] = STATE
                if not plan.gathers:
                    self.held[rank][f"weights:{unit.name}"] = unit.name

    def fail(self, rule: int, message: str, rank: int | None = None, buffer: str = "") -> None:
        """Note that the running task breaks a rule: on one rank, for what a buffer holds."""
        if rule in self.failures:
            return
        cells = tuple(sorted(self.cells, key=lambda cell: cell[0] != rank))
        if cells and buffer:
            cells += tuple(c for c in self._uses(cells[0], buffer) if c not in cells)
        self.failures[rule] = Failure(message=message, cells=cells)

    def fit(self, rank: int, instruction: Instruction) -> None:
        """The entries of the buffers that the instruction names can hold what belongs there."""
        unfit = self.expected.unfit[rank]
        for buffer in (*instruction.reads, *instruction.writes):
            if buffer_key(buffer) in unfit:
                self.fail(5, unfit[buffer_key(buffer)], rank)

    def need(self, rank: int, buffer: str, content: Content) -> None:
        """The running task finds `content` in a buffer that it reads."""
        found = self.held[rank].get(buffer, content)
        if found is not content and found != content:
            message = f"{buffer} holds {words(found)} where {words(content)} is needed"
            self.fail(5, message, rank, buffer)

    def find_reads(self, rank: int, instruction: Instruction) -> None:
        """Whatever the running task reads holds something."""
        held = self.held[rank]
        for buffer in instruction.reads:
            if buffer not in held:
                message = f"rank {rank} reads {buffer}, which holds nothing then: not written yet, "
                self.fail(5, message + "or spent or released before", rank, buffer)

    def _uses(self, cell: Cell, buffer: str) -> list[Cell]:
        """The nearest instructions of the rank that name a buffer, before and after one of them."""
        rank, position = cell
        program = self.plan.programs[rank]
        uses = [i for i, step in enumerate(program) if buffer in (*step.reads, *step.writes)]
        before = [(rank, index) for index in uses if index < position]
        after = [(rank, index) for index in uses if index > position]
        return before[-1:] + after[:1]


def words(content: Content) -> str:
    """A content, for messages."""
    if content is NAMED:
        return "what it is named for"
    match content:
        case Gradient():
            return f"a gradient of {content.unit}"
        case int():
            return f"what stage {content} and later ones added"
    return content if content in (STATE, UPDATED, MIXED) else f"the weights of {content}"


def describe(instruction: Instruction) -> str:
    """`BACKWARD of stage 3, micro-batch 1`, for messages."""
    found = [f"unit {instruction.unit}"] if instruction.unit is not None else []
    found += [f"stage {instruction.stage}"] if instruction.stage is not None else []
    if instruction.micro_batch is not None:
        found.append(f"micro-batch {instruction.micro_batch}")
    return f"{instruction.opcode.value} of {', '.join(found)}" if found else instruction.opcode
