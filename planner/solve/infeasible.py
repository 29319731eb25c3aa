"""Why nothing fits, and which single change would.

This module knows the memory model. It proposes only changes under which that model finds a fit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from planner.errors import InfeasibleError, TraceError, UsageError
from planner.solve.bounds import least_rank_units
from planner.solve.build import Builder
from planner.solve.choices import Choice, mesh_groups
from planner.solve.entry import Clock
from planner.solve.instance import Instance, overflow_units, rank_units
from planner.solve.memory import bytes_by_class
from planner.solve.problem import Problem
from planner.solve.sizes import Sizes
from planner.solve.splits import fits, warm_start

__all__ = [
    "MAX_TRIES",
    "by_headroom",
    "explain",
    "format_bytes",
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


def explain(
    problem: Problem, builder: Builder, instances: Sequence[Instance], margin_bytes: int
) -> InfeasibleError:
    """The nearest miss by class of bytes, and the changes that would make it fit.

    `margin_bytes` is what the simulator found on a rank beyond the memory model: a change must
    leave room for it too.
    """
    tried = [
        (instance, warm_start(instance, SEARCH_EFFORT))
        for instance in by_headroom(instances)[:MAX_TRIES]
    ]
    instance, boundaries = min(tried, key=lambda pair: _overflow_bytes(*pair))
    choice = instance.choice
    excess = [
        units - limit
        for units, limit in zip(rank_units(instance, boundaries), instance.limit_units, strict=True)
    ]
    rank = excess.index(max(excess))
    limit = builder.mesh_of(choice).limit_bytes[rank]
    classes = bytes_by_class(
        builder.figures_of(choice), choice, builder.memory_of(choice), boundaries, rank
    )
    if margin_bytes:
        classes["found by the simulator beyond these"] = margin_bytes
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in classes.items() if count)
    return InfeasibleError(
        f"no placement fits in memory. The nearest ({choice.describe()}) needs "
        f"{format_bytes(sum(classes.values()))} on pipeline rank {rank}, the limit is "
        f"{format_bytes(limit)}: {parts}",
        hint="; or ".join(_remedies(problem, tried, margin_bytes))
        or "a smaller model: no single change of batch, mesh, recompute or devices fits",
    )


def _overflow_bytes(instance: Instance, boundaries: tuple[int, ...]) -> int:
    return overflow_units(instance, boundaries)[0] * instance.unit_bytes


def _remedies(
    problem: Problem, tried: list[tuple[Instance, tuple[int, ...]]], margin_bytes: int
) -> Iterator[str]:
    for changed, describe in _changes(problem):
        found = _find_fit(changed, margin_bytes)
        if found is not None:
            yield describe(found)
    least = min(
        max(rank_units(instance, boundaries)) * instance.unit_bytes
        for instance, boundaries in tried
    )
    enough = _round_up(least + margin_bytes)
    if _find_fit(dataclasses.replace(problem, memory_limit_bytes=enough), margin_bytes):
        yield f"a memory limit of {format_bytes(enough)} per device"


def _changes(problem: Problem) -> Iterator[tuple[Problem, Callable[[Choice], str]]]:
    """Single changes of what the user fixed, then of the number of devices."""
    wanted = problem.constraints

    def freed(**choices: None) -> Problem:
        return dataclasses.replace(problem, constraints=dataclasses.replace(wanted, **choices))

    if wanted.recompute is False:
        yield freed(recompute=None), lambda _: "recompute the activations"
    if wanted.partition == 0:
        yield freed(partition=None), lambda _: "partition level 3"
    if wanted.micro_batch_size is not None or wanted.num_micro_batches is not None:
        yield (
            freed(micro_batch_size=None, num_micro_batches=None),
            lambda c: f"{c.num_micro_batches} micro-batches of {c.micro_batch_size} per replica",
        )
    if wanted.stages_per_rank is not None:
        yield freed(stages_per_rank=None), lambda c: f"{c.stages_per_rank} stages per rank"
    if wanted.num_replicas is not None or wanted.num_pipeline_ranks is not None:
        yield (
            freed(num_replicas=None, num_pipeline_ranks=None),
            lambda c: f"{c.num_replicas} replicas x {c.num_pipeline_ranks} pipeline ranks",
        )
    for factor in (2, 4):
        cluster = problem.cluster
        number = factor * problem.num_devices
        if number > cluster.num_devices:
            cluster = dataclasses.replace(cluster, hosts=cluster.hosts * factor)
        yield (
            dataclasses.replace(problem, cluster=cluster, num_devices=number),
            lambda c: f"{c.num_replicas * c.num_pipeline_ranks} devices ({c.describe()})",
        )


def _find_fit(problem: Problem, margin_bytes: int) -> Choice | None:
    """A choice that fits by the memory model, `margin_bytes` spared on every rank."""
    builder = Builder(problem=problem)
    sizes = Sizes(problem=problem, clock=Clock(limit_seconds=math.inf))
    try:
        choices = next(mesh_groups(problem, sizes.count_layers(), accepts=sizes.accepts))
    except (TraceError, UsageError):
        return None
    instances = (builder.instance(c) for c in choices if sizes.accepts(c.micro_batch_size))
    spared = [with_margin(i, [margin_bytes] * len(i.fixed_units)) for i in instances]
    possible = [i for i in spared if least_rank_units(i) <= max(i.limit_units)]
    for instance in by_headroom(possible)[:MAX_TRIES]:
        if fits(instance, warm_start(instance, SEARCH_EFFORT)):
            return instance.choice
    return None


def with_margin(instance: Instance, margin_bytes: Sequence[int]) -> Instance:
    """The instance with so many more bytes on each rank."""
    return dataclasses.replace(
        instance,
        fixed_units=tuple(
            units + -(-margin // instance.unit_bytes)
            for units, margin in zip(instance.fixed_units, margin_bytes, strict=True)
        ),
    )


def _round_up(num_bytes: int) -> int:
    """To whole GiB, MiB or bytes, so that the printed figure is the true one."""
    for unit in (2**30, 2**20):
        if num_bytes >= 4 * unit:
            return math.ceil(num_bytes / unit) * unit
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """In the largest unit of which there are at least four, or bytes."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= 4 * unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"
