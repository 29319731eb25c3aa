"""Every state that a plan can reach, and what must hold in all of them and at the end.

Memory of a rank is largest right after it has issued something, and is measured there.

Reduction. Nothing that happens takes away what else can happen: an instruction that can be issued
or finished can be so until it is. Two kinds of transition therefore need not be tried late:
1. The finish of a compute instruction. Its rank issues nothing before, so nothing is seen between.
2. An issue. What it binds is settled, and the later it comes the more memory has been given back.
With `reduce=False` every transition is tried at every moment; a test compares both.
"""

import random

from oracle.counts import miscounted
from oracle.facts import Facts, Fault, OracleResult
from oracle.machine import Cell, Machine, State
from oracle.operations import Wrong
from oracle.signatures import malformed
from planner.plan.types import Plan

__all__ = ["judge"]

_NUM_WALKS = 30


def judge(
    plan: Plan, *, max_states: int = 20_000, reduce: bool = True, seed: int = 0
) -> OracleResult:
    """Run the plan, and its evaluation, in every interleaving.

    Beyond `max_states` states, random walks drawn from `seed` sample the rest.
    """
    result = _judge(plan, max_states, reduce, seed)
    if not plan.evaluation:
        return result
    other = _judge(plan.forward_only(), max_states, reduce, seed)
    peaks = zip(result.peak_bytes, other.peak_bytes, strict=False)
    return OracleResult(
        faults=result.faults + other.faults,
        peak_bytes=tuple(max(pair) for pair in peaks),
        num_states=result.num_states + other.num_states,
        complete=result.complete and other.complete,
    )


def _judge(plan: Plan, max_states: int, reduce: bool, seed: int) -> OracleResult:
    facts = Facts(plan)
    if faults := tuple(malformed(facts)):
        return OracleResult(faults=faults)
    explorer = _Explorer(facts, reduce)
    complete = explorer.explore_all(max_states)
    if not complete:
        explorer.walk(random.Random(seed))
    faults = (*miscounted(facts), *explorer.faults)
    if plan.prediction is not None:
        least = plan.prediction.memory_limit_bytes
        limits = plan.prediction.rank_limit_bytes or [least] * len(explorer.peak)
        if any(peak > limit for peak, limit in zip(explorer.peak, limits, strict=True)):
            faults += (Fault(kind="memory", message=f"{explorer.peak} exceed {limits} bytes"),)
    return OracleResult(
        faults=faults,
        peak_bytes=tuple(explorer.peak),
        num_states=len(explorer.seen),
        complete=complete,
    )


class _Explorer:
    """Depth-first search; states that were seen before are not searched again."""

    def __init__(self, facts: Facts, reduce: bool) -> None:
        self.facts, self.machine, self.reduce = facts, Machine(facts), reduce
        self.seen: set[tuple[object, ...]] = set()
        self.faults: dict[Fault, None] = {}
        ranks = range(len(facts.plan.programs))
        self.resident = [facts.resident_bytes(rank) for rank in ranks]
        self.lives = [facts.lives(rank) for rank in ranks]
        self.transient = [
            [facts.transient_bytes(rank, i) for i in range(len(facts.plan.programs[rank]))]
            for rank in ranks
        ]
        self.peak = self.resident.copy()

    def explore_all(self, max_states: int) -> bool:
        """Search from the start; False if there are more states than `max_states`."""
        pending = [self.machine.start()]
        while pending:
            for state in self._successors(pending.pop()):
                key = state.key()
                if key in self.seen:
                    continue
                if len(self.seen) == max_states:
                    return False
                self.seen.add(key)
                pending.append(state)
        return True

    def walk(self, chooser: random.Random) -> None:
        """A few random ways to the end."""
        for _ in range(_NUM_WALKS):
            states = [self.machine.start()]
            while states:
                states = self._successors(chooser.choice(states))

    def _successors(self, state: State) -> list[State]:
        """Every next state, those left out that a fault has ended."""
        found = []
        moves: list[int | tuple[Cell, ...]] = [*self.machine.finishable(state)]
        moves += [r for r in range(len(self.peak)) if self.machine.can_issue(state, r)]
        if self.reduce:
            moves = next(([m] for m in moves if self._need_not_wait(m)), moves)
        if not moves:
            self._end(state)
        for move in moves:
            after = state.copy()
            try:
                if isinstance(move, int):
                    self.machine.issue(after, move)
                    self._measure(after, move)
                else:
                    self.machine.finish(after, move)
            except Wrong as wrong:
                kind, message = wrong.args
                self.faults[Fault(kind=kind, message=message)] = None
            else:
                found.append(after)
        return found

    def _need_not_wait(self, move: int | tuple[Cell, ...]) -> bool:
        if isinstance(move, int):
            return True
        rank, index = move[0]
        return self.facts.plan.programs[rank][index].stream == "compute"

    def _measure(self, state: State, rank: int) -> None:
        """What the rank holds right after it has issued an instruction."""
        index = state.issued[rank] - 1
        flying = sum(1 << i for i in state.flying[rank])
        ahead = -1 << state.issued[rank]
        held = sum(
            life.num_bytes
            for life in self.lives[rank]
            if life.first <= index and life.uses & (flying | ahead)
        )
        total = self.resident[rank] + held + self.transient[rank][index]
        self.peak[rank] = max(self.peak[rank], total)

    def _end(self, state: State) -> None:
        """Nothing can happen any more: either the step is over, and what it leaves is whole."""
        plan = self.facts.plan
        for rank, program in enumerate(plan.programs):
            if state.issued[rank] < len(program) or state.flying[rank]:
                stuck = [
                    program[i]
                    for i in (*state.flying[rank], state.issued[rank])[:3]
                    if i < len(program)
                ]
                self.faults[Fault(kind="hang", message=f"rank {rank} waits at {stuck}")] = None
        if self.faults or not self.facts.trains:
            return
        copied = ["shard", "moments"] if plan.options.save else self.facts.away
        wanted = [f"host:{kind}" for kind in copied] + ["weights"] * self.facts.joins_updates
        for unit in plan.units:
            if not unit.trainable:
                continue
            for rank in unit.ranks:
                for buffer in (f"{kind}:{unit.name}" for kind in wanted):
                    if state.held[rank].get(buffer) != ("updated", unit.name):
                        message = f"{buffer} of rank {rank} is not the updated state"
                        self.faults[Fault(kind="end", message=message)] = None
