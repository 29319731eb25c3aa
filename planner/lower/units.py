"""Which parameters are gathered, reduced and updated together.

A parameter that one stage alone uses belongs to that stage's unit (one per dtype, or pair of master
and compute dtype). Parameters that several stages use are tied; those shared by the same stages
form a unit of their own, held by every rank that uses it, so that its gradients can be added across
ranks element by element.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from planner.graph import DTYPE_BYTES, LayerGraph, ParameterSpec, StageCode
from planner.plan.flat import flat_length
from planner.plan.types import PlanOptions, Unit
from planner.schedules import Schedule
from planner.solve.types import Placement

__all__ = ["make_units", "units_by_stage"]


def make_units(
    graph: LayerGraph, placement: Placement, options: PlanOptions, codes: Sequence[StageCode]
) -> tuple[Unit, ...]:
    """The units of all stages (`codes`), own ones in stage order, then tied ones."""
    users: dict[str, list[int]] = {}
    for stage, code in enumerate(codes):
        for name in code.parameters:
            users.setdefault(name, []).append(stage)
    specs = graph.parameter_specs
    groups: dict[tuple[tuple[int, ...], str, str], list[ParameterSpec]] = {}
    for name, using in users.items():
        spec = specs[name]
        groups.setdefault((tuple(using), spec.dtype, spec.compute_dtype), []).append(spec)
    own = {key: group for key, group in groups.items() if len(key[0]) == 1}
    tied = {key: group for key, group in groups.items() if len(key[0]) > 1}
    num_groups = Counter(stages for stages, _, _ in own)
    units = []
    for (stages, dtype, compute_dtype), group in sorted(own.items()):
        alone = num_groups[stages] == 1
        # Masters and parameters that are float32 throughout may be apart in compute type alone.
        types = f"{dtype}.{compute_dtype}" if compute_dtype else dtype
        name = f"stage.{stages[0]}" if alone else f"stage.{stages[0]}.{types}"
        units.append(_unit(name, group, stages, placement, options))
    for index, ((stages, _, _), group) in enumerate(sorted(tied.items())):
        units.append(_unit(f"tied.{index}", group, stages, placement, options))
    return tuple(units)


def units_by_stage(units: Iterable[Unit], num_stages: int) -> list[tuple[Unit, ...]]:
    """The units of each stage, in the order of `units`."""
    found: list[list[Unit]] = [[] for _ in range(num_stages)]
    for unit in units:
        for stage in unit.stages:
            found[stage].append(unit)
    return [tuple(used) for used in found]


def _unit(
    name: str,
    group: list[ParameterSpec],
    stages: tuple[int, ...],
    placement: Placement,
    options: PlanOptions,
) -> Unit:
    ranks = tuple(sorted({placement.stage_ranks[stage] for stage in stages}))
    dtype, compute_dtype = group[0].dtype, group[0].compute_dtype
    return Unit(
        name=name,
        dtype=dtype,
        compute_dtype=compute_dtype,
        parameters=tuple(spec.name for spec in group),
        num_elements=flat_length(
            [spec.num_elements for spec in group],
            DTYPE_BYTES[compute_dtype or dtype],
            is_packed=placement.partition == 3,
        ),
        update_transient_bytes=_update_bytes(group, placement, options),
        stages=stages,
        ranks=ranks,
        trainable=any(spec.trainable for spec in group),
        exact=(
            len(stages) > 1
            and len(ranks) == 1
            and placement.num_replicas == 1
            # Needs backward to reach the unit's later stages first, as every family does.
            and placement.schedule is not Schedule.CUSTOM
        ),
    )


def _update_bytes(
    group: Sequence[ParameterSpec], placement: Placement, options: PlanOptions
) -> int:
    """Peak of what the optimizer makes while it updates one replica's part of the parameters.

    Of a partitioned parameter a replica holds a piece: no larger than it, nor than the part.
    """
    sizes = [spec.num_bytes for spec in group if spec.trainable]
    part = -(-sum(spec.num_bytes for spec in group) // placement.num_parts)
    turns = 0.0
    for previous, size in itertools.pairwise((0, *sizes)):
        here = min(size, part)
        turn = options.update_slots_of_each * here
        turns = max(turns, turn + options.update_slots_of_previous * min(previous, part - here))
    return math.ceil(turns + options.update_slots_of_all * min(sum(sizes), part))
