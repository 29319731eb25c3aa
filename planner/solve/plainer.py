"""Plainer choices that take no longer: offload, partition, recompute and stages cost the user more
than the step-time model counts.

This module knows which of two choices is plainer. It does not know which others there are.
"""

import dataclasses
from collections.abc import Iterator

from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.problem import Constraints
from planner.solve.recompute import choose_recompute
from planner.solve.sketch import sketch
from planner.solve.splits import fits
from planner.solve.trial import Best, Trial
from planner.solve.types import Split

__all__ = ["TIE", "plainer"]

TIE = 1 + 1e-9
"""Steps that differ by less than this factor take equally long."""
ROUNDING = 1 + 1e-6
"""The same of the step-time model, whose ticks are rounded."""


def plainer(best: Best, builder: Builder, wanted: Constraints) -> Iterator[Trial]:
    """Trials that are plainer than the best and, by the step-time model, as fast; those that differ
    most from it first."""
    limit = best.objective_seconds * ROUNDING
    for choice in _choices(best.instance.choice, wanted):
        instance = builder.instance(choice)
        trial = Trial(instance=instance, bound_seconds=best.trial.bound_seconds)
        if choice.num_stages == best.instance.choice.num_stages:
            split = choose_recompute(instance, best.split.boundaries)
            trial.offer(split if fits(instance, split) else None)
        else:
            trial.offer(sketch(instance))
        if trial.objective_seconds <= limit:
            yield trial
    if wanted.recompute is None:
        yield from _less_recompute(best, limit)


def _choices(choice: Choice, wanted: Constraints) -> Iterator[Choice]:
    """With less of one thing each."""
    if choice.offload_state and wanted.allows(choice.partition, offload_state=False):
        yield dataclasses.replace(choice, offload_state=False)
    if choice.offload_inputs and wanted.offload_inputs is None:
        yield dataclasses.replace(choice, offload_inputs=False)
    for partition in range(choice.partition):
        if wanted.allows(partition, offload_state=choice.offload_state):
            size = choice.partition_group_size if partition else 0
            yield dataclasses.replace(choice, partition=partition, partition_group_size=size)
    if wanted.stages_per_rank is None and not choice.assignment:
        for number in sorted({1, choice.stages_per_rank // 2, choice.stages_per_rank - 1} - {0}):
            if number < choice.stages_per_rank:
                yield dataclasses.replace(choice, stages_per_rank=number)


def _less_recompute(best: Best, limit: float) -> Iterator[Trial]:
    """With one stage less that runs forward again."""
    for stage, again in enumerate(best.split.recompute):
        if again:
            flags = list(best.split.recompute)
            flags[stage] = False
            split = Split(boundaries=best.split.boundaries, recompute=tuple(flags))
            trial = Trial(instance=best.instance, bound_seconds=best.trial.bound_seconds)
            trial.offer(split if fits(best.instance, split) else None)
            if trial.objective_seconds <= limit:
                yield trial
