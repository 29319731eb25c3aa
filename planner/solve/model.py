"""The split problem as a constraint programme: which layers form which stage.

The encoding looks a boundary's position up in prefix sums (AddElement), which closes faster than
a boolean per layer and stage where layers differ. This module knows the Instance alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from planner.solve.bounds import least_step_ticks
from planner.solve.instance import Instance, stage_ticks
from planner.solve.pace import StageTicks, step_time

__all__ = ["Split", "solve_split"]

Linear = cp_model.LinearExpr | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """CP-SAT's answer."""

    boundaries: tuple[int, ...] | None
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
    hint: tuple[int, ...]

    def look_up(self, table: Sequence[int], cut: int) -> Linear:
        """The table's value at the position of a cut."""
        low, high = self.ranges[cut]
        values = table[low : high + 1]
        if min(values) == max(values):
            return values[0]
        found = self.model.new_int_var(min(values), max(values), f"value {cut}")
        self.model.add_element(self.cuts[cut] - low, values, found)
        self.model.add_hint(found, table[self.hint[cut]])
        return found

    def spans(self, prefix: Sequence[int]) -> list[Linear]:
        """Each stage's part of a prefix sum."""
        values = [self.look_up(prefix, cut) for cut in range(len(self.cuts))]
        return [end - first for first, end in itertools.pairwise(values)]

    def own(self, rank: int) -> range:
        """The stages of a pipeline rank."""
        choice = self.instance.choice
        return range(rank, choice.num_stages, choice.num_pipeline_ranks)


def solve_split(
    instance: Instance,
    *,
    hint: tuple[int, ...],
    window: int | None,
    time_limit_seconds: float,
    seed: int,
) -> Split:
    """The fastest split that fits memory, each boundary at most `window` layers from the hint's.

    A window of None searches all splits, so that the bound holds for all of them.
    """
    # Data: where each cut may lie, leaving at least one layer to every stage.
    stages, layers = instance.choice.num_stages, instance.num_layers
    reach = layers if window is None else window
    ranges = (
        (0, 0),
        *(
            (max(cut, hint[cut] - reach), min(layers - (stages - cut), hint[cut] + reach))
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
    for cut, position in zip(cuts, hint, strict=True):
        model.add_hint(cut, position)

    # Solve.
    solver = _make_solver(time_limit_seconds, seed)
    status = solver.solve(model)
    least = least_step_ticks(instance)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Split(boundaries=None, bound_ticks=least, proved=status == cp_model.INFEASIBLE)
    return Split(
        boundaries=tuple(solver.value(cut) for cut in cuts),
        bound_ticks=max(least, round(solver.best_objective_bound)),
        proved=status == cp_model.OPTIMAL,
    )


def _make_solver(time_limit_seconds: float, seed: int) -> cp_model.CpSolver:
    """One worker closes as fast as two here; and unless the machine is so slow that the clock ends
    the search before the solver's own measure of time does, every run gives one answer.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = time_limit_seconds / 2
    solver.parameters.max_time_in_seconds = time_limit_seconds
    return solver


def _add_step_time(split: _SplitModel) -> cp_model.IntVar:
    """The step's length as a variable that nothing but the constraints holds up."""
    instance, model, cuts = split.instance, split.model, range(split.instance.choice.num_stages)
    horizon = _horizon(instance)
    forward = _with_ends(split, instance.forward, instance.entry, instance.exit)
    backward = _with_ends(split, instance.backward, instance.gradient_entry, instance.gradient_exit)
    rebuild = forward if instance.choice.recompute else [0] * len(forward)
    gather, reduce = split.spans(instance.gather), split.spans(instance.reduce)
    # Even the smallest update takes its kernel's overhead.
    update = [_at_least(split, span) for span in split.spans(instance.update)]
    kinds = [instance.hop_kind(cut) for cut in cuts]
    stages = [
        StageTicks(
            forward=forward[stage],
            rebuild=rebuild[stage],
            backward=backward[stage],
            # A hop takes as long as what crosses its cut takes on its link.
            arrival=split.look_up(instance.hops[kinds[stage]], stage),
            gradient_arrival=split.look_up(instance.gradient_hops[kinds[stage]], stage),
            gather=gather[stage] + instance.gather_per_stage,
            reduce=reduce[stage] + instance.reduce_per_stage,
            update=update[stage],
        )
        for stage in cuts
    ]

    # A moment is not before any of those that it waits for.
    moments_of_hint: list[int] = []

    def latest_number(*values: int) -> int:
        moments_of_hint.append(max(values))
        return moments_of_hint[-1]

    step_time(stage_ticks(instance, split.hint), instance.pace, latest_number)
    moments = iter(moments_of_hint)

    def latest(*values: Linear) -> Linear:
        hinted = next(moments)
        if len(values) == 1:
            return values[0]
        moment = model.new_int_var(0, horizon, "moment")
        model.add_hint(moment, hinted)
        for value in values:
            model.add(moment >= value)
        return moment

    # The step ends when the last rank's last update does.
    step = model.new_int_var(least_step_ticks(instance), horizon, "step")
    model.add(step >= step_time(stages, instance.pace, latest) + instance.tied_ticks)
    return step


def _with_ends(
    split: _SplitModel, prefix: Sequence[int], begin: Sequence[int], end: Sequence[int]
) -> list[Linear]:
    """Each stage's part of a prefix sum, and what it loses to the messages at its two cuts."""
    return [
        span + split.look_up(begin, stage) + split.look_up(end, stage + 1)
        for stage, span in enumerate(split.spans(prefix))
    ]


def _at_least(split: _SplitModel, span: Linear) -> Linear:
    least = split.instance.least_update
    if least == 0:
        return span
    update = split.model.new_int_var(least, max(least, split.instance.update[-1]), "update")
    split.model.add(update >= span)
    return update


def _horizon(instance: Instance) -> int:
    """No split takes longer: everything in sequence."""
    choice = instance.choice
    hop = max(max(table) for table in (*instance.hops, *instance.gradient_hops))
    ends = 2 * (max(instance.entry) + max(instance.exit))
    ends += max(instance.gradient_entry) + max(instance.gradient_exit)
    latency = instance.least_update + 2 * instance.gather_per_stage + instance.reduce_per_stage
    return (
        instance.tied_ticks
        + choice.num_micro_batches * (instance.time[-1] + choice.num_stages * (2 * hop + ends))
        + 2 * instance.gather[-1]
        + instance.reduce[-1]
        + instance.update[-1]
        + choice.num_stages * latency
    )


def _always_fits(instance: Instance) -> bool:
    """Whether even a rank that held every layer would be within its limit."""
    entries = instance.choice.stages_per_rank * max(instance.entry_kept)
    most = instance.kept[-1] + entries + instance.buffer[-1] + instance.rebuilt[-1]
    return all(
        fixed + most <= limit
        for fixed, limit in zip(instance.fixed_units, instance.limit_units, strict=True)
    )


def _add_memory(split: _SplitModel) -> None:
    instance, model = split.instance, split.model
    stages = range(instance.choice.num_stages)
    layers = split.spans(instance.kept)
    entries = [split.look_up(instance.entry_kept, stage) for stage in stages]
    exits = [split.look_up(instance.exit_unkept, stage + 1) for stage in stages]
    buffers = split.spans(instance.buffer)
    rebuilt = split.spans(instance.rebuilt)
    unkept = [split.look_up(instance.rebuilt_exit_unkept, stage + 1) for stage in stages]
    for rank in range(instance.choice.num_pipeline_ranks):
        # A rank's buffers are as large as its largest stage.
        buffer = model.new_int_var(0, instance.buffer[-1], f"buffer {rank}")
        for stage in split.own(rank):
            model.add(buffer >= buffers[stage])

        # It rebuilds one micro-batch of one stage at a time.
        largest = model.new_int_var(0, instance.rebuilt[-1], f"rebuilt {rank}")
        for stage in split.own(rank):
            model.add(largest >= rebuilt[stage] - unkept[stage])

        # All that a rank holds at its peak is within its limit.
        kept = sum(layers[stage] + entries[stage] - exits[stage] for stage in split.own(rank))
        available = instance.limit_units[rank] - instance.fixed_units[rank]
        model.add(kept + buffer + largest <= available)
