"""The plan's table of buffers, compared with the model, and the pools it asks for.

This module knows sizes. It does not know when anything happens.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import PlanFileError
from planner.plan.flat import moment_elements
from planner.plan.names import kind_of
from planner.plan.types import Buffer, Plan
from runtime.program import Program
from runtime.shards import UnitState

__all__ = ["check_table", "make_pools"]

_OF_PART = ("shard", "reduced", "moments")


@dataclass(frozen=True, slots=True)
class _Needed:
    """What the model needs of a buffer."""

    dtype: str
    num_elements: int
    unit: str


def check_table(
    plan: Plan, rank: int, units: Mapping[str, UnitState], programs: Iterable[Program]
) -> None:
    """Refuse a table whose buffers of units do not fit the model's parameters.

    Raises:
        PlanFileError: one is of another type, or of another size (too small, for pools).
    """
    table = {buffer.name: buffer for buffer in plan.buffers[rank]}
    pools = {pair for program in programs for pair in program.units_of_pools()}
    for name, needed in _needs(plan, table, pools, units):
        buffer = table.get(name)
        held = (buffer.dtype, math.prod(buffer.shape)) if buffer else ("nothing", 0)
        is_pool = kind_of(name) == "sum" or (kind_of(name) == "weights" and plan.gathers)
        fits = held[1] >= needed.num_elements if is_pool else held[1] == needed.num_elements
        if held[0] != needed.dtype or not fits:
            raise PlanFileError(
                f"buffer {name} of pipeline rank {rank} is planned for {held[1]} x {held[0]}, but "
                f"the model's parameters in unit {needed.unit} need {needed.num_elements} x "
                f"{needed.dtype}",
                hint="plan again: lga-plan for this model",
            )


def _needs(
    plan: Plan,
    table: Mapping[str, Buffer],
    pools: Iterable[tuple[str, str]],
    units: Mapping[str, UnitState],
) -> Iterator[tuple[str, _Needed]]:
    for name in table:
        kind, _, unit = name.removeprefix("host:").partition(":")
        if unit not in units:
            continue
        whole, part = _lengths(plan, units[unit])
        if kind in _OF_PART:
            if kind == "reduced" and not plan.divides_gradients:
                part = whole
            if kind == "moments":
                trained = (math.prod(units[unit].shapes[n]) for n in units[unit].trainable)
                part = plan.options.optimizer_slots * moment_elements(trained, part)
            yield name, _Needed(units[unit].dtype, part, unit)
        elif kind == "weights" and not plan.gathers:
            yield name, _Needed(units[unit].weights_dtype, whole, unit)
    for name, unit in pools:
        state = units[unit]
        dtype = state.weights_dtype if kind_of(name) == "weights" else state.dtype
        yield name, _Needed(dtype, _lengths(plan, state)[0], unit)


def _lengths(plan: Plan, state: UnitState) -> tuple[int, int]:
    """Elements of the whole unit, padded, and of one rank's part, as the plan counts them."""
    if not state.partitioned:
        return state.num_elements, state.num_elements
    part = -(-state.num_elements // plan.num_parts)
    return part * plan.num_parts, part


def make_pools(
    plan: Plan,
    rank: int,
    kind: str,
    units: Mapping[str, UnitState],
    programs: Iterable[Program],
    device: torch.device,
) -> dict[str, Tensor]:
    """The rank's buffers of a kind (`weights` or `sum`) that units take turns in.

    As large as the plan says, or as the largest unit is here: parameters that are not partitioned
    each start where their own tensor would be aligned.
    """
    lengths: dict[str, int] = {}
    for program in programs:
        for name, unit in program.units_of_pools():
            lengths[name] = max(units[unit].padded_length, lengths.get(name, 0))
    return {
        buffer.name: torch.zeros(
            max(math.prod(buffer.shape), lengths[buffer.name]),
            dtype=getattr(torch, buffer.dtype),
            device=device,
        )
        for buffer in plan.buffers[rank]
        if kind_of(buffer.name) == kind and buffer.name in lengths
    }
