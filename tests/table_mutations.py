"""Every small change to a plan's tables: what its programs refer to, and what the runtime reads.

The programs stay as they are. A change may break the plan, or do no harm.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from planner.plan.types import Plan
from planner.schedules import Schedule

__all__ = ["changed_tables"]


def changed_tables(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(what was changed, the changed plan) for each of them."""
    for what, changed in (
        *_fields(plan), *_options(plan), *_stages(plan), *_units(plan), *_specs(plan)
    ):  # fmt: skip
        if changed != plan:
            yield what, changed


def _fields(plan: Plan) -> Iterator[tuple[str, Plan]]:
    choices: dict[str, tuple[Any, ...]] = {
        "schedule": tuple(Schedule),
        "num_replicas": (plan.num_replicas - 1, plan.num_replicas + 1),
        "num_micro_batches": (plan.num_micro_batches - 1, plan.num_micro_batches + 1),
        "micro_batch_size": (plan.micro_batch_size - 1, plan.micro_batch_size + 1),
        "partition": (0, 1, 2, 3),
        "partition_group_size": (0, 2, 3),
        "offload_state": (not plan.offload_state,),
        "num_random_operators": (plan.num_random_operators - 1, plan.num_random_operators + 1),
        "layer_names": (
            plan.layer_names[1:],
            plan.layer_names[::-1],
            (*plan.layer_names, plan.layer_names[0]),
        ),
        "evaluation": (plan.programs,),
        "programs": (plan.evaluation,),
    }
    for field, values in choices.items():
        for value in values:
            yield f"{field} of the plan", replace(plan, **{field: value})


def _options(plan: Plan) -> Iterator[tuple[str, Plan]]:
    options = plan.options
    choices: dict[str, tuple[Any, ...]] = {
        "optimizer_slots": (options.optimizer_slots - 1, options.optimizer_slots + 1),
        "check_finite": (not options.check_finite,),
        "clip_norm": (1.0 if options.clip_norm is None else None,),
        "clip_delayed": (not options.clip_delayed,),
        "save": (not options.save,),
        "update_on_host": (not options.update_on_host,),
    }
    for field, values in choices.items():
        for value in values:
            yield (
                f"{field} of the options",
                replace(plan, options=replace(options, **{field: value})),
            )


def _stages(plan: Plan) -> Iterator[tuple[str, Plan]]:
    tensors = tuple(spec.name for spec in plan.tensors)
    names = {
        "layers": plan.layer_names,
        "inputs": tensors,
        "outputs": (*tensors, "loss"),
        "batch_keys": tuple(spec.name for spec in plan.batch),
        "units": tuple(unit.name for unit in plan.units),
        "mutated_inputs": tensors,
        "kept": (*tensors, *(spec.name for spec in plan.batch)),
    }
    for index, stage in enumerate(plan.stages):
        found: list[tuple[str, Any]] = [("recompute", not stage.recompute)]
        found += [("rank", rank) for rank in range(plan.num_pipeline_ranks)]
        for field, known in names.items():
            found += [(field, value) for value in _edits(getattr(stage, field), known)]
        found += [("code", value) for value in _edits(stage.code, ())]
        found += [("code", other.code) for other in plan.stages]
        for place, statement in enumerate(stage.code):
            for shift in (-1, 1):
                keys = replace(
                    statement, first_random_operator=statement.first_random_operator + shift
                )
                if statement.num_random_operators:
                    found.append(("code", (*stage.code[:place], keys, *stage.code[place + 1 :])))
        for field, value in found:
            stages = list(plan.stages)
            stages[index] = replace(stage, **{field: value})
            yield f"{field} of stage {index}: {value}", replace(plan, stages=tuple(stages))


def _units(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for index, unit in enumerate(plan.units):
        found: list[tuple[str, Any]] = [
            ("trainable", not unit.trainable),
            ("exact", not unit.exact),
            ("num_elements", unit.num_elements - 1),
            ("num_elements", unit.num_elements + 1),
            ("dtype", "float64"),
        ]
        names = tuple(spec.name for spec in plan.parameters)
        for field, known in (
            ("stages", tuple(range(plan.num_stages))),
            ("ranks", tuple(range(plan.num_pipeline_ranks))),
            ("parameters", names),
        ):
            found += [(field, value) for value in _edits(getattr(unit, field), known)]
        for field, value in found:
            units = list(plan.units)
            units[index] = replace(unit, **{field: value})
            yield f"{field} of {unit.name}: {value}", replace(plan, units=tuple(units))
        yield f"{unit.name} dropped", replace(plan, units=_without(plan.units, index))


def _specs(plan: Plan) -> Iterator[tuple[str, Plan]]:
    for table, flag in (("tensors", "requires_grad"), ("parameters", "trainable"), ("batch", "")):
        specs: tuple[Any, ...] = getattr(plan, table)
        for index, spec in enumerate(specs):
            shape = (*spec.shape[:-1], spec.shape[-1] + 1) if spec.shape else (1,)
            found: list[tuple[str, Any]] = [("dtype", "float64"), ("shape", shape)]
            found += [(flag, not getattr(spec, flag))] if flag else []
            for field, value in found:
                changed = (*specs[:index], replace(spec, **{field: value}), *specs[index + 1 :])
                yield f"{field} of {spec.name}", replace(plan, **{table: changed})
            yield f"{spec.name} dropped", replace(plan, **{table: _without(specs, index)})


def _edits(names: tuple[Any, ...], known: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """One less, one twice, two exchanged, or one more of what there is."""
    for index in range(len(names)):
        yield _without(names, index)
        yield (*names[: index + 1], *names[index:])
    if len(names) > 1:
        yield (names[1], names[0], *names[2:])
    yield from ((*names, name) for name in known if name not in names)


def _without(names: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return (*names[:index], *names[index + 1 :])
