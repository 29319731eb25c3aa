"""Why nothing fits: the nearest miss, class by class, and splits that need little memory.

This module knows the memory model. `planner.explain.remedies` knows which changes would do.
"""

import dataclasses
from collections.abc import Sequence

from planner.errors import InfeasibleError
from planner.solve.bounds import least_rank_units
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.classes import bytes_by_class
from planner.solve.instance import Instance, overflow_units, rank_units
from planner.solve.problem import Problem
from planner.solve.splits import balanced_split, warm_start
from planner.solve.types import Split

__all__ = [
    "MAX_TRIES",
    "SEARCH_EFFORT",
    "by_headroom",
    "excess_bytes",
    "explain",
    "format_bytes",
    "lean_split",
    "lean_splits",
    "leaner",
    "with_margin",
]

MAX_TRIES = 20
"""Choices, roomiest first, that are searched for a fit."""
SEARCH_EFFORT = 600


def by_headroom(instances: Sequence[Instance]) -> list[Instance]:
    """Roomiest first: by what the fullest rank needs at least."""
    return sorted(
        instances,
        key=lambda instance: least_rank_units(instance) * instance.unit_bytes,
    )


def leaner(problem: Problem, choices: Sequence[Choice]) -> list[Choice]:
    """What takes less memory than the choices: offload and single buffers, where not demanded.

    Only of choices that recompute, unless the demand is not to.
    """
    wanted = problem.constraints
    state, inputs = wanted.offload_state is not False, wanted.offload_inputs is not False
    lean = (
        dataclasses.replace(
            choice,
            offload_state=state,
            offload_inputs=inputs,
            num_buffers=wanted.num_buffers or 1,
        )
        for choice in choices
        if choice.recompute is not False or wanted.recompute is False
    )
    known = set(choices)
    return [choice for choice in dict.fromkeys(lean) if choice not in known]


def explain(
    builder: Builder, instance: Instance, split: Split, margin_bytes: int
) -> InfeasibleError:
    """The nearest miss, `split`, by class of bytes.

    `margin_bytes` is what the simulator found on a rank beyond the memory model.
    """
    choice = instance.choice
    excess = [
        units - limit
        for units, limit in zip(rank_units(instance, split), instance.limit_units, strict=True)
    ]
    rank = excess.index(max(excess))
    limit = builder.mesh_of(choice).limit_bytes[rank]
    classes = bytes_by_class(builder.instance_in(choice, 1), split, rank)
    if margin_bytes:
        classes["found by the simulator beyond these"] = margin_bytes
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in classes.items() if count)
    return InfeasibleError(
        f"no placement fits in memory. The nearest ({choice.describe()}) needs "
        f"{format_bytes(sum(classes.values()))} on pipeline rank {rank}, the limit is "
        f"{format_bytes(limit)}: {parts}",
        hint="more memory or devices, a smaller batch, or leave more choices open",
    )


def lean_split(instance: Instance) -> Split:
    """Of the splits that are balanced in something, the one nearest to the memory there is."""
    stages = instance.choice.num_stages
    splits = {
        instance.choice.split(balanced_split(prefix, stages))
        for prefix in (instance.kept, instance.buffer, instance.time)
    }
    return min(sorted(splits), key=lambda split: overflow_units(instance, split))


def lean_splits(builder: Builder, instances: Sequence[Instance]) -> list[tuple[Instance, Split]]:
    """Splits that need little memory, of these choices and of leaner ones, the nearest first."""
    lean = leaner(builder.problem, [instance.choice for instance in instances])
    return sorted(
        _tried([*instances, *map(builder.instance, lean)]), key=lambda pair: _overflow_bytes(*pair)
    )


def _tried(instances: Sequence[Instance]) -> list[tuple[Instance, Split]]:
    """The roomiest with splits that need little memory: a local search for the nearest few."""
    lean = [(instance, lean_split(instance)) for instance in by_headroom(instances)[:MAX_TRIES]]
    lean.sort(key=lambda pair: _overflow_bytes(*pair))
    searched = [(instance, warm_start(instance, SEARCH_EFFORT)) for instance, _ in lean[:2]]
    return [*searched, *lean]


def _overflow_bytes(instance: Instance, split: Split) -> int:
    return overflow_units(instance, split)[0] * instance.unit_bytes


def excess_bytes(instance: Instance, split: Split, peak_bytes: Sequence[int]) -> list[int]:
    """What each rank's simulated peak has beyond the memory model's."""
    units = rank_units(instance, split)
    return [
        max(0, peak - held * instance.unit_bytes)
        for peak, held in zip(peak_bytes, units, strict=True)
    ]


def with_margin(instance: Instance, margin_bytes: Sequence[int]) -> Instance:
    """The instance with so many more bytes on each rank."""
    return dataclasses.replace(
        instance,
        fixed_units=tuple(
            units + -(-margin // instance.unit_bytes)
            for units, margin in zip(instance.fixed_units, margin_bytes, strict=True)
        ),
    )


def format_bytes(num_bytes: int) -> str:
    """In the largest unit of which there are at least four, or bytes."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= 4 * unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"
