"""Numbers that no plan needs: refused before anything loops over them or adds them up.

A plan file may come from anywhere. What stands in it in many lines is as large as the file, but a
single number can claim anything; here the numbers meet bounds far beyond real models and clusters.
This module does not know what the numbers are for.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from planner.graph import DTYPE_BYTES
from planner.plan.types import Plan

__all__ = ["limit_problems"]

_MAX_BYTES = 2**46
"""Of one tensor, buffer or unit: sums of a hundred thousand still fit in 64 bits."""
_MAX_FLOAT = 1e300
_MAX_SECONDS = 1e9
_LEAST_DIVISOR = 1e-9
_MAX_COUNT = 2**20
"""Of devices, micro-batches, and samples in one of those."""
_MAX_DIMENSIONS = 64
_MAX_SLOTS = 100


def limit_problems(plan: Plan) -> Iterator[str]:
    """Counts, sizes and durations that cannot be, in words."""
    yield from _count_problems(plan)
    for name in ("cluster", "options", "prediction"):
        value = getattr(plan, name)
        for place, number in _numbers(name, asdict(value) if value else {}):
            least, most = _bounds(place)
            if not least <= number <= most:
                yield f"{place} is {number}, which is not from {least} to {most}"
    yield from _size_problems(plan)


def _count_problems(plan: Plan) -> Iterator[str]:
    if plan.module_buffer_bytes > _MAX_BYTES:
        yield f"the model's buffers are larger than {_MAX_BYTES} bytes"
    counts = {
        "devices": plan.cluster.num_devices,
        "micro-batches": plan.num_micro_batches,
        "samples in a micro-batch": plan.micro_batch_size,
    }
    for name, count in counts.items():
        if count > _MAX_COUNT:
            yield f"{count} {name} are more than the {_MAX_COUNT} a plan may have"
    # Work over all passes must not outgrow the file: whole programs name each pass at least once.
    num_instructions = sum(map(len, (*plan.programs, *plan.evaluation)))
    num_passes = plan.num_stages * plan.num_micro_batches
    if num_passes > 10_000 + 10 * num_instructions:
        yield f"{num_passes} passes through stages in {num_instructions} instructions"


def _size_problems(plan: Plan) -> Iterator[str]:
    shaped: tuple[Iterable[Any], ...] = (plan.batch, plan.tensors, plan.parameters, *plan.buffers)
    for spec in (spec for specs in shaped for spec in specs):
        if len(spec.shape) > _MAX_DIMENSIONS or max(spec.shape, default=0) > _MAX_BYTES:
            yield f"{spec.name} has an impossible shape"
        elif math.prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 1) > _MAX_BYTES:
            yield f"{spec.name} is larger than {_MAX_BYTES} bytes"
    for unit in plan.units:
        largest = max(
            unit.num_elements * DTYPE_BYTES.get(unit.dtype, 1), unit.update_transient_bytes
        )
        if largest > _MAX_BYTES:
            yield f"unit {unit.name} is larger than {_MAX_BYTES} bytes"
    for stage in plan.stages:
        for place, number in _numbers(f"stage {stage.index}", asdict(replace(stage, code=()))):
            most = _MAX_SECONDS if place.endswith("_seconds") else _MAX_BYTES
            if not 0 <= number <= most:
                yield f"{place} is {number}, which is not from 0 to {most}"


def _bounds(place: str) -> tuple[float, float]:
    """Least and most of a number, by what its name says of it."""
    name = place.rpartition(".")[2]
    if name.endswith("_seconds"):
        return (0, _MAX_SECONDS)
    if name.endswith(("bandwidth", "efficiency", "clip_norm")) or ".peak_flops." in place:
        return (_LEAST_DIVISOR, _MAX_FLOAT)
    if ".allocator." in place:
        return (1, _MAX_BYTES)
    if name == "bubble":
        return (-_LEAST_DIVISOR, 1)
    return (0, _MAX_SLOTS if "slots" in name else _MAX_FLOAT)


def _numbers(place: str, value: object) -> Iterator[tuple[str, float]]:
    """Every number inside a value, and where it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{place}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{place}.{index}", item)
    elif isinstance(value, int | float):
        yield place, value
