"""Reads a CSV of torch.distributed.pipelining: actions per rank, checked, as an Order.

Both forms are read. Of a CSV with communication only the compute makes the order, since the
lowering makes its own transfers; they are still checked, so that a wrong file is not believed. This
module knows torch's cells and what makes a schedule complete. It does not know costs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from planner.errors import UsageError
from planner.export.torch_cells import HINT, Action, read_rows
from planner.plan.types import Opcode
from planner.schedule import ComputeStep, Order

__all__ = ["ImportedSchedule", "parse_csv"]

_OPCODES = {
    "F": Opcode.FORWARD,
    "B": Opcode.BACKWARD,
    "I": Opcode.BACKWARD_INPUT,
    "W": Opcode.BACKWARD_WEIGHT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedSchedule:
    """What a CSV says, complete and consistent."""

    order: Order
    stage_ranks: tuple[int, ...]
    """Pipeline rank of each stage."""
    num_micro_batches: int
    is_renumbered: bool
    """Micro-batches have new numbers: those of the order of their backward passes, which was the
    same for all stages, but not ascending."""

    @property
    def splits_backward(self) -> bool:
        return any(
            step.opcode is Opcode.BACKWARD_INPUT for steps in self.order.ranks for step in steps
        )


def parse_csv(text: str, *, source: str = "schedule") -> ImportedSchedule:
    """Read and check a schedule; `source` names it in messages.

    Actions that torch lets overlap (`(1F2;3B0)OVERLAP_F_B`) come one after the other.

    Raises:
        UsageError: a cell is no action, a stage is missing or on two ranks, an action of a stage
            and micro-batch is missing, doubled or too early, or a transfer has one end only.
    """
    rows = read_rows(text, source)
    actions = [action for row in rows for action in row]
    stage_ranks = _stage_ranks(actions, source)
    num_micro_batches = _check_complete(actions, len(stage_ranks), source)
    _check_transfers(actions, stage_ranks, source)
    order = Order(
        ranks=tuple(
            tuple(
                ComputeStep(opcode=_OPCODES[a.kind], stage=a.stage, micro_batch=a.micro_batch)
                for a in row
                if a.kind in _OPCODES and a.micro_batch is not None
            )
            for row in rows
        )
    )
    numbers = _backward_numbers(order)
    return ImportedSchedule(
        order=_renumbered(order, numbers),
        stage_ranks=stage_ranks,
        num_micro_batches=num_micro_batches,
        is_renumbered=any(old != new for old, new in numbers.items()),
    )


def _stage_ranks(actions: list[Action], source: str) -> tuple[int, ...]:
    found: dict[int, Action] = {}
    for action in actions:
        first = found.setdefault(action.stage, action)
        if first.rank != action.rank:
            raise UsageError(
                f"{action.place}: stage {action.stage} is on rank {action.rank} here and on rank "
                f"{first.rank} in {first.place.removeprefix(f'{source}: ')}",
                hint="a stage runs on one rank",
            )
    missing = next(stage for stage in range(len(found) + 1) if stage not in found)
    if missing < len(found):
        raise UsageError(
            f"{source} has stage {max(found)}, but no stage {missing}",
            hint="number the stages from 0 without gaps",
        )
    return tuple(found[stage].rank for stage in range(len(found)))


def _check_complete(actions: list[Action], num_stages: int, source: str) -> int:
    """Every stage does each micro-batch once, in an order that can be; their number."""
    compute = {}
    for action in actions:
        if action.kind in _OPCODES and action.micro_batch is not None:
            key = (action.stage, action.kind, action.micro_batch)
            if key in compute:
                raise UsageError(f"{action.place} stands there for the second time", hint=HINT)
            compute[key] = action
    counts = Counter(stage for stage, kind, _ in compute if kind == "F")
    num_micro_batches = max(counts.values(), default=0)
    if not num_micro_batches:
        raise UsageError(f"{source} has no forward", hint=HINT)
    for key, action in compute.items():
        if action.micro_batch is not None and action.micro_batch >= num_micro_batches:
            raise UsageError(
                f"{action.place}: micro-batch {action.micro_batch}, but the stages run "
                f"{num_micro_batches} forwards, so they number from 0 to {num_micro_batches - 1}",
                hint=HINT,
            )
        _check_follows(compute, key, action)
    for stage in range(num_stages):
        for micro_batch in range(num_micro_batches):
            done = {kind for kind in _OPCODES if (stage, kind, micro_batch) in compute}
            if done not in ({"F", "B"}, {"F", "I", "W"}):
                words = ", ".join(sorted(done)) or "nothing"
                raise UsageError(
                    f"{source}: stage {stage} does {words} for micro-batch {micro_batch}",
                    hint="each micro-batch needs F and B, or F, I and W, in every stage",
                )
    return num_micro_batches


def _check_follows(
    compute: Mapping[tuple[int, str, int], Action], key: tuple[int, str, int], action: Action
) -> None:
    """B and I need F before them on the rank, W needs I."""
    stage, kind, micro_batch = key
    needed = {"B": "F", "I": "F", "W": "I"}.get(kind)
    if needed is None:
        return
    before = compute.get((stage, needed, micro_batch))
    if before is None or before.position > action.position:
        raise UsageError(f"{action.place} has no {stage}{needed}{micro_batch} before it", hint=HINT)


def _check_transfers(actions: list[Action], stage_ranks: tuple[int, ...], source: str) -> None:
    """Where there are transfers, each hop between ranks has both its ends, and no other has any."""
    found = {}
    for action in actions:
        if action.kind.startswith(("SEND", "RECV")):
            key = (action.kind, action.stage, action.micro_batch)
            if key in found:
                raise UsageError(f"{action.place} stands there for the second time", hint=HINT)
            found[key] = action
    if not found:
        return
    wanted = {
        (kind, stage, action.micro_batch): action
        for action in actions
        for kind, stage in _ends(action, stage_ranks)
    }
    for key, action in found.items():
        if key not in wanted:
            raise UsageError(f"{action.place} belongs to no hop between two ranks", hint=HINT)
        cause = wanted[key]
        is_early = action.rank == cause.rank and action.position < cause.position
        if action.kind.startswith("SEND") and is_early:
            raise UsageError(f"{action.place} comes before {cause.word}", hint=HINT)
    for (kind, stage, micro_batch), action in wanted.items():
        if (kind, stage, micro_batch) not in found:
            raise UsageError(
                f"{source} has no {stage}{kind}{micro_batch}, which {action.word} needs",
                hint="a CSV with some transfers must have all of them",
            )
    _check_arrives_in_time(actions, found)


def _ends(action: Action, stage_ranks: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Transfers that a compute action makes necessary: (kind, stage) of both ends."""
    step = {"F": 1, "B": -1, "I": -1}.get(action.kind, 0)
    peer = action.stage + step
    if step and 0 <= peer < len(stage_ranks) and stage_ranks[peer] != action.rank:
        letter = "F" if step > 0 else "B"
        yield f"SEND_{letter}", action.stage
        yield f"RECV_{letter}", peer


def _check_arrives_in_time(
    actions: list[Action], transfers: Mapping[tuple[str, int, int | None], Action]
) -> None:
    for action in actions:
        letter = {"F": "F", "B": "B", "I": "B"}.get(action.kind)
        arrival = transfers.get((f"RECV_{letter}", action.stage, action.micro_batch))
        if arrival is not None and letter and arrival.position > action.position:
            raise UsageError(
                f"{arrival.place} comes after {action.word}, which needs it",
                hint=HINT,
            )


def _backward_numbers(order: Order) -> dict[int, int]:
    """Old number -> new number that makes backward ascending; as they are where stages differ.

    Gradients add up in the order of micro-batches, as in plain accumulation; micro-batches of a
    step may be numbered in any way.
    """
    sequences: dict[int, list[int]] = {}
    for steps in order.ranks:
        for step in steps:
            if step.opcode in (Opcode.BACKWARD, Opcode.BACKWARD_WEIGHT):
                sequences.setdefault(step.stage, []).append(step.micro_batch)
    first, *others = sequences.values()
    if any(sequence != first for sequence in others):
        first.sort()
    return {old: new for new, old in enumerate(first)}


def _renumbered(order: Order, numbers: Mapping[int, int]) -> Order:
    return Order(
        ranks=tuple(
            tuple(replace(step, micro_batch=numbers[step.micro_batch]) for step in steps)
            for steps in order.ranks
        )
    )
