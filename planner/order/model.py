"""The order of one step's compute as a constraint programme.

Each operation is an interval of fixed length on its rank. This module knows Operations alone. What
made it close fast: a complete hint and an upper bound from list schedules, a lower bound as the
domain of the makespan, micro-batches in ascending order, and starts between longest paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from planner.order.operations import Operations, Sequences
from planner.order.paths import Times, heads_and_tails, least_makespan, times_of, topological

__all__ = ["Solved", "solve_order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """CP-SAT's answer."""

    times: Times
    """The best order known: the start's where nothing better was found."""
    bound: int
    """No order takes fewer ticks."""

    @property
    def proved(self) -> bool:
        """Whether no order is better."""
        return self.bound >= self.times.makespan


def solve_order(
    operations: Operations,
    start: Times,
    *,
    time_limit_seconds: float,
    seed: int,
) -> Solved:
    """The order with the shortest makespan that fits in memory; at worst `start`, which does."""
    # Data: when each operation can start if the makespan is not to exceed that of `start`.
    least = least_makespan(operations)
    if least >= start.makespan or time_limit_seconds <= 0:
        return Solved(times=start, bound=min(least, start.makespan))
    heads, tails = heads_and_tails(operations)

    # Model.
    model = cp_model.CpModel()

    # Variables.
    starts = [
        model.new_int_var(head, start.makespan - tail - ticks, f"start {operation}")
        for operation, (head, tail, ticks) in enumerate(
            zip(heads, tails, operations.durations, strict=True)
        )
    ]
    makespan = model.new_int_var(least, start.makespan, "makespan")

    # Constraints.
    intervals = _add_compute(model, operations, starts)
    # What a rank holds is within its capacity.
    for rank in range(operations.num_ranks):
        _add_memory(model, operations, rank, starts, intervals, start)
    # The step ends after everything.
    for operation, ticks in enumerate(operations.durations):
        model.add(makespan >= starts[operation] + ticks + tails[operation])

    # Objective.
    model.minimize(makespan)
    for variable, moment in zip(starts, start.starts, strict=True):
        model.add_hint(variable, moment)
    model.add_hint(makespan, start.makespan)

    # Solve.
    solver = _make_solver(time_limit_seconds, seed)
    status = solver.solve(model)
    bound = max(least, round(solver.best_objective_bound))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Solved(times=start, bound=min(bound, start.makespan))
    found = times_of(operations, _sequences(operations, [solver.value(s) for s in starts]))
    assert found is not None
    better = found if found.makespan < start.makespan else start
    return Solved(times=better, bound=min(bound, better.makespan))


def _make_solver(time_limit_seconds: float, seed: int) -> cp_model.CpSolver:
    """A linear relaxation says little about who goes first: without one it closes several times
    faster, and one worker faster than two that take turns. Unless the clock ends the search before
    the solver's own measure of time does, every run gives one answer.
    """
    solver = cp_model.CpSolver()
    solver.parameters.linearization_level = 0
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = time_limit_seconds / 2
    solver.parameters.max_time_in_seconds = time_limit_seconds
    return solver


def _add_compute(
    model: cp_model.CpModel, operations: Operations, starts: Sequence[cp_model.IntVar]
) -> list[cp_model.IntervalVar]:
    # What an operation waits for has started long enough before.
    for operation, predecessors in enumerate(operations.predecessors):
        for earlier, ticks in predecessors:
            model.add(starts[operation] >= starts[earlier] + ticks)
    # A rank does one thing at a time.
    intervals = [
        model.new_fixed_size_interval_var(begin, ticks, f"operation {operation}")
        for operation, (begin, ticks) in enumerate(zip(starts, operations.durations, strict=True))
    ]
    for rank in range(operations.num_ranks):
        model.add_no_overlap(
            interval for op, interval in enumerate(intervals) if operations.ranks[op] == rank
        )
    return intervals


def _add_memory(
    model: cp_model.CpModel,
    operations: Operations,
    rank: int,
    starts: Sequence[cp_model.IntVar],
    intervals: Sequence[cp_model.IntervalVar],
    hint: Times,
) -> None:
    """Each micro-batch of a stage is held from its forward's start to its backward's end."""
    stages = operations.stages_of(rank)
    if _always_fits(operations, rank, stages):
        return
    held: list[cp_model.IntervalVar] = []
    units: list[int] = []
    for stage in stages:
        for micro_batch in range(operations.num_micro_batches):
            forward = operations.forward_of(stage, micro_batch)
            backward = operations.backward_of(stage, micro_batch)
            ticks = operations.durations[backward]
            life = model.new_int_var(0, hint.makespan, f"life {forward}")
            model.add_hint(life, hint.starts[backward] + ticks - hint.starts[forward])
            held.append(
                model.new_interval_var(
                    starts[forward], life, starts[backward] + ticks, f"held {forward}"
                )
            )
            units.append(operations.held[stage])
            for operation, extra in (
                (forward, operations.forward_extra[stage]),
                (backward, operations.backward_extra[stage]),
            ):
                if extra:
                    held.append(intervals[operation])
                    units.append(extra)
    model.add_cumulative(held, units, operations.capacity[rank])


def _always_fits(operations: Operations, rank: int, stages: Sequence[int]) -> bool:
    """Whether the rank could hold everything at once."""
    most = sum(operations.held[stage] for stage in stages) * operations.num_micro_batches
    extra = max(
        max(operations.forward_extra[stage], operations.backward_extra[stage]) for stage in stages
    )
    return most + extra <= operations.capacity[rank]


def _sequences(operations: Operations, starts: Sequence[int]) -> Sequences:
    """Ranks' operations by their starts; those of no length by what waits for what."""
    ranks: list[list[int]] = [[] for _ in range(operations.num_ranks)]
    for operation in sorted(
        topological(operations), key=lambda op: (starts[op], starts[op] + operations.durations[op])
    ):
        ranks[operations.ranks[operation]].append(operation)
    return tuple(map(tuple, ranks))
