"""Which parameters are gathered, reduced and updated together.

A parameter that one stage alone uses belongs to that stage's unit (one per dtype). Parameters
that several stages use are tied; those shared by the same stages form a unit of their own, held
by every rank that uses it, so that its gradients can be added across ranks element by element.
"""

from planner.graph import LayerGraph, ParameterSpec
from planner.plan.types import Unit
from planner.solve.types import Placement

__all__ = ["make_units", "pool_name"]


def pool_name(unit: Unit) -> str:
    """The pool of buffers a unit shares: a tied unit's own, else that of all units of its dtype."""
    return unit.name if len(unit.stages) > 1 else unit.dtype


def make_units(graph: LayerGraph, placement: Placement) -> tuple[Unit, ...]:
    """The units of all stages, own ones in stage order, then tied ones."""
    users: dict[str, list[int]] = {}
    for stage in range(placement.num_stages):
        first, last = placement.boundaries[stage], placement.boundaries[stage + 1] - 1
        for name in graph.stage_code(first, last).parameters:
            users.setdefault(name, []).append(stage)
    specs = graph.parameter_specs
    groups: dict[tuple[tuple[int, ...], str], list[ParameterSpec]] = {}
    for name, using in users.items():
        groups.setdefault((tuple(using), specs[name].dtype), []).append(specs[name])
    own = {key: group for key, group in groups.items() if len(key[0]) == 1}
    tied = {key: group for key, group in groups.items() if len(key[0]) > 1}
    units = []
    for (stages, dtype), group in sorted(own.items()):
        alone = sum(other == stages for other, _ in own) == 1
        name = f"stage.{stages[0]}" if alone else f"stage.{stages[0]}.{dtype}"
        units.append(_unit(name, dtype, group, stages, placement))
    for index, ((stages, dtype), group) in enumerate(sorted(tied.items())):
        units.append(_unit(f"tied.{index}", dtype, group, stages, placement))
    return tuple(units)


def _unit(
    name: str,
    dtype: str,
    group: list[ParameterSpec],
    stages: tuple[int, ...],
    placement: Placement,
) -> Unit:
    ranks = tuple(sorted({placement.stage_ranks[stage] for stage in stages}))
    return Unit(
        name=name,
        dtype=dtype,
        parameters=tuple(spec.name for spec in group),
        num_elements=sum(spec.num_elements for spec in group),
        stages=stages,
        ranks=ranks,
        trainable=any(spec.trainable for spec in group),
        exact=len(stages) > 1 and len(ranks) == 1 and placement.num_replicas == 1,
    )
