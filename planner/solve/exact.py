"""Small problems: every placement, the likeliest first, until no other can be faster.

The step-time model orders the placements and bounds them: of a chain of layers it leaves out only
what transfers that meet lose to each other, so it is never slower than the simulator. The simulator
says what each takes and whether it fits. This module knows how to count a space and go through it.
It does not know how large ones are searched.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from planner.graph import LayerGraph
from planner.solve.assign import assigned, assignments, may_assign
from planner.solve.bounds import least_step_ticks
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.instance import Instance, step_ticks
from planner.solve.problem import Problem
from planner.solve.space import Batching, all_options, choice_of, layouts
from planner.solve.types import Split

__all__ = ["CAREFUL", "is_chain", "is_small", "ranked"]

MAX_PLACEMENTS = 20_000
"""Spaces up to this size are gone through in full."""
MAX_ASSIGNED = 4_000
"""The same of placements with stages on other ranks than s mod P."""
MAX_BUFFERS = 3
CAREFUL = 1 - 1e-6
"""Ticks are rounded: the step-time model may be slower than the simulator by this part."""

Ranked = tuple[float, int, Instance, Split]
"""Seconds by the step-time model, a number, and what takes them."""


def is_small(
    problem: Problem, space: Sequence[Batching], num_layers: int, *, modular: bool = True
) -> bool:
    """Whether the whole space is small enough to be gone through: with stage s on rank s mod P, or
    with stages on any other ranks."""
    found = 0
    for batching in space:
        for choice in _all_choices(problem, batching, num_layers, modular=modular):
            recomputes = 2**choice.num_stages if choice.recompute is None else 1
            found += recomputes * math.comb(num_layers - 1, choice.num_stages - 1)
            if found > (MAX_PLACEMENTS if modular else MAX_ASSIGNED):
                return False
    return True


def is_chain(graph: LayerGraph) -> bool:
    """Whether every tensor is read by the next layer alone: the step-time model is a bound then."""
    makers = graph.makers
    return all(
        reader == makers[name] + 1 for name, readers in graph.readers.items() for reader in readers
    )


def ranked(
    problem: Problem,
    space: Sequence[Batching],
    num_layers: int,
    builder: Builder,
    *,
    modular: bool = True,
    faster_than: float = math.inf,
) -> list[Ranked]:
    """Every placement, fastest first by the step-time model; `faster_than` so many seconds alone
    are of interest."""
    found: list[Ranked] = []
    for batching in space:
        for choice in _all_choices(problem, batching, num_layers, modular=modular):
            instance = builder.instance(choice)
            if least_step_ticks(instance) * instance.tick_seconds * CAREFUL >= faster_than:
                continue
            for split in _all_splits(choice, num_layers):
                seconds = step_ticks(instance, split) * instance.tick_seconds
                found.append((seconds, len(found), instance, split))
    return sorted(found, key=lambda entry: entry[:2])


def _all_choices(
    problem: Problem, batching: Batching, num_layers: int, *, modular: bool
) -> Iterator[Choice]:
    """Every setting of the other choices."""
    wanted, every = problem.constraints, all_options(problem, batching)
    plain = choice_of(problem, batching, every[0], stages_per_rank=1)
    placed = [
        (options, layout) for options in every for layout in layouts(problem, batching, options)
    ]
    for stages in _all_stages(problem, plain, num_layers, modular=modular):
        for (options, layout), num_buffers in itertools.product(
            placed,
            range(1, min(MAX_BUFFERS, stages.stages_per_rank) + 1)
            if wanted.num_buffers is None
            else (wanted.num_buffers,),
        ):
            yield replace(
                stages, **dataclasses.asdict(options), layout=layout, num_buffers=num_buffers
            )


def _all_stages(
    problem: Problem, plain: Choice, num_layers: int, *, modular: bool
) -> Iterator[Choice]:
    """The choice with any number of stages: stage s on rank s mod P, or on any other ranks."""
    ranks, wanted = plain.num_pipeline_ranks, problem.constraints
    if modular:
        for per_rank in range(1, num_layers // ranks + 1):
            if wanted.stages_per_rank in (None, per_rank):
                yield replace(plain, stages_per_rank=per_rank)
    elif may_assign(wanted):
        # Ranks of one host differ in nothing but their numbers.
        alike = plain.num_replicas * ranks <= problem.cluster.hosts[0].num_devices
        for num_stages in range(ranks, num_layers + 1):
            for assignment in assignments(num_stages, ranks, alike=alike):
                choice = assigned(plain, assignment)
                if choice.assignment:
                    yield choice


def _all_splits(choice: Choice, num_layers: int) -> Iterator[Split]:
    """Every split of a choice."""
    stages = choice.num_stages
    for cuts in itertools.combinations(range(1, num_layers), stages - 1):
        boundaries = (0, *cuts, num_layers)
        if choice.recompute is not None:
            yield choice.split(boundaries)
            continue
        for recompute in itertools.product((False, True), repeat=stages):
            yield Split(boundaries=boundaries, recompute=recompute)
