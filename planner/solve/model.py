"""The split problem as a constraint programme: which layers form which stage.

The encoding looks a boundary's position up in prefix sums (AddElement), which closes faster than
a boolean per layer and stage where layers differ. This module knows the Instance alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from planner.solve.bounds import least_step_ticks
from planner.solve.instance import Instance, stage_ticks, stages_of
from planner.solve.moments import peaks
from planner.solve.pace import step_time
from planner.solve.step_parts import Pace
from planner.solve.tables import Table
from planner.solve.types import Split

__all__ = ["SplitAnswer", "solve_split"]

Linear = cp_model.LinearExpr | int

CLOCK_MARGIN = 4
"""The clock ends a search after so many times the seconds that it is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitAnswer:
    """CP-SAT's answer."""

    split: Split | None
    """None where none was found."""
    bound_ticks: int
    """No split within the window is faster."""
    proved: bool
    """The search ended: the split is the best within the window, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SplitModel:
    """The model under construction, and how it reads tables."""

    instance: Instance
    model: cp_model.CpModel
    ranges: tuple[tuple[int, int], ...]
    """Least and largest position of each cut."""
    cuts: tuple[cp_model.IntVar, ...]
    """The layer at which each stage begins, and the end."""
    hint: Split

    def look_up(self, table: Sequence[int], cut: int) -> Linear:
        """The table's value at the position of a cut."""
        low, high = self.ranges[cut]
        values = table[low : high + 1]
        if min(values) == max(values):
            return values[0]
        found = self.model.new_int_var(min(values), max(values), f"value {cut}")
        self.model.add_element(self.cuts[cut] - low, values, found)
        self.model.add_hint(found, table[self.hint.boundaries[cut]])
        return found

    def span(self, table: Table, stage: int) -> Linear:
        """What a table counts of a stage."""
        return self.look_up(table.begins, stage) + self.look_up(table.ends, stage + 1)


def solve_split(
    instance: Instance,
    *,
    hint: Split,
    window: int | None,
    time_limit_seconds: float,
    seed: int,
) -> SplitAnswer:
    """The fastest split that fits memory, each boundary at most `window` layers from the hint's.

    A window of None searches all splits, so that the bound holds for all of them.
    """
    # Data: where each cut may lie, leaving at least one layer to every stage.
    stages, layers = instance.choice.num_stages, instance.num_layers
    reach, near = layers if window is None else window, hint.boundaries
    ranges = (
        (0, 0),
        *(
            (max(cut, near[cut] - reach), min(layers - (stages - cut), near[cut] + reach))
            for cut in range(1, stages)
        ),
        (layers, layers),
    )

    # Model.
    model = cp_model.CpModel()

    # Variables.
    cuts = tuple(
        model.new_int_var(low, high, f"cut {cut}") for cut, (low, high) in enumerate(ranges)
    )
    split = _SplitModel(instance=instance, model=model, ranges=ranges, cuts=cuts, hint=hint)

    # Constraints.
    # Every stage holds at least one layer.
    for first, end in itertools.pairwise(cuts):
        model.add(first + 1 <= end)
    step = _add_step_time(split)
    if not _always_fits(instance):
        _add_memory(split)

    # Objective.
    model.minimize(step)
    for cut, position in zip(cuts, near, strict=True):
        model.add_hint(cut, position)

    # Solve.
    solver = _make_solver(time_limit_seconds, seed)
    status = solver.solve(model)
    least = least_step_ticks(instance)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return SplitAnswer(split=None, bound_ticks=least, proved=status == cp_model.INFEASIBLE)
    return SplitAnswer(
        split=Split(boundaries=tuple(solver.value(cut) for cut in cuts), recompute=hint.recompute),
        bound_ticks=max(least, round(solver.best_objective_bound)),
        proved=status == cp_model.OPTIMAL,
    )


def _make_solver(time_limit_seconds: float, seed: int) -> cp_model.CpSolver:
    """One worker closes as fast as two here, and every run gives one answer: the solver's own
    measure of time ends the search, and the clock only on a machine that is many times slower.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = time_limit_seconds / 2
    solver.parameters.catch_sigint_signal = False  # Ctrl-C ends the whole search
    solver.parameters.max_time_in_seconds = CLOCK_MARGIN * time_limit_seconds
    return solver


def _add_step_time(split: _SplitModel) -> cp_model.IntVar:
    """The step's length as a variable that nothing but the constraints holds up."""
    instance, model = split.instance, split.model
    horizon = _horizon(instance)

    def at_least(span: Linear, least: int) -> Linear:
        # Even the smallest update takes its kernel's overhead.
        if least == 0:
            return span
        update = model.new_int_var(least, horizon, "update")
        model.add(update >= span)
        return update

    def column(name: str) -> list[Linear]:
        return [split.span(getattr(k, name), s) for s, k in enumerate(instance.tables)]

    # A hop takes as long as what crosses its cut takes on its link.
    stages = stages_of(instance, column, split.hint.recompute, split.look_up, at_least)

    # A moment is not before any of those that it waits for.
    moments_of_hint: list[int] = []

    def latest_number(*values: int) -> int:
        moments_of_hint.append(max(values))
        return moments_of_hint[-1]

    step_time(stage_ticks(instance, split.hint), instance.pace, latest_number)
    moments = iter(moments_of_hint)

    def latest(*values: Linear) -> Linear:
        hinted = next(moments)
        moment = model.new_int_var(0, horizon, "moment")
        model.add_hint(moment, hinted)
        for value in values:
            model.add(moment >= value)
        return moment

    # The step ends when the last rank's last update does.
    step = model.new_int_var(least_step_ticks(instance), horizon, "step")
    model.add(step >= step_time(stages, instance.pace, latest))
    return step


def _horizon(instance: Instance) -> int:
    """No split takes longer: everything in sequence, on every rank."""
    count, pace = instance.choice.num_micro_batches, instance.pace
    each = (
        "gather", "reduce", "update", "gather_updated", "sending", "returning", "shard", "moments",
        "read",
    )  # fmt: skip
    longest = sum(max(table) for table in (*instance.hops, *instance.gradient_hops))
    whole = 2 * count * longest * len(pace.stage_ranks)
    for kind in instance.kinds:
        compute = (kind.forward, kind.again, kind.backward)
        repeated = sum(_whole(table, pace) for table in compute)
        repeated += _whole(kind.load, pace) + 2 * _whole(kind.inputs, pace)
        whole += count * repeated + kind.least_update * len(pace.stage_ranks)
        whole += 3 * sum(_whole(getattr(kind, name), pace) for name in each)
    between = 8 * pace.issue * len(pace.stage_ranks)
    return whole + between + pace.tied + pace.tied_update + pace.verdict


def _whole(table: Table, pace: Pace) -> int:
    """At most what all stages together take."""
    return table.prefix[-1] + len(pace.stage_ranks) * (max(table.entry) + max(table.leave))


def _always_fits(instance: Instance) -> bool:
    """Whether even a rank that held every layer would be within its limit."""
    memory, pace = instance.memory, instance.pace
    buffers = memory.num_gather_buffers * memory.gather.prefix[-1]
    buffers += memory.num_sum_buffers * memory.sums.prefix[-1]
    stored = max(_whole(table, pace) for table in memory.stored)
    held = max(
        max(_whole(table, pace) for table in moment.own)
        + sum(_whole(near.table, pace) for near in moment.near)
        for moment in memory.moments
    )
    most = memory.state.prefix[-1] + buffers + stored + _whole(memory.waiting, pace) + held
    return all(
        fixed + most <= limit
        for fixed, limit in zip(instance.fixed_units, instance.limit_units, strict=True)
    )


def _add_memory(split: _SplitModel) -> None:
    """What each rank holds at the worst of its moments is within its limit."""
    instance, model, recompute = split.instance, split.model, split.hint.recompute
    most = 2 * sum(instance.limit_units) + 2**32

    def either(tables: tuple[Table, Table], stage: int) -> Linear:
        return split.span(tables[recompute[stage]], stage)

    def largest(*values: Linear) -> Linear:
        # The largest of some quantities is at least each of them.
        found = model.new_int_var(-most, most, "largest")
        for value in values:
            model.add(found >= value)
        return found

    found = peaks(instance.memory, instance.pace.own, split.span, either, largest)
    for peak, fixed, limit in zip(found, instance.fixed_units, instance.limit_units, strict=True):
        model.add(peak + fixed <= limit)
