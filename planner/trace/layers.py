"""Build the LayerGraph: group assigned statements, name what crosses, describe parameters.

It knows the LayerGraph's contract. It does not know how the statements came about.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from planner.graph import LayerGraph, ParameterSpec, TensorSpec
from planner.plan.code import Statement, references
from planner.trace.analyse import Analysis, Facts
from planner.trace.assign import PROLOGUE, assign_layers, live_statements
from planner.trace.node import LayerBuilder, Line, boundary_spec, renamed
from planner.trace.statements import identifier

__all__ = ["build_layer_graph"]


def build_layer_graph(
    statements: Sequence[Statement],
    analysis: Analysis,
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    model_name: str,
    fingerprint: str,
    micro_batch_size: int,
) -> LayerGraph:
    """The LayerGraph of analysed statements.

    Raises:
        TraceError: two aliases of one tensor cross into a layer that changes it in place.
    """
    numbered = _number_random(statements, analysis.facts)
    lines = _rename_crossing(_place(numbered, analysis.facts, model), model_name)
    names = _layer_names(lines, model_name)
    parameters = _parameter_specs(model, analysis.trained)
    makers = {line.statement.target: line for line in lines}
    grouped: list[list[Line]] = [[] for _ in names]
    for line in lines:
        if line.layer != PROLOGUE:
            grouped[line.layer].append(line)
    crossing = _crossing(lines, makers)
    prologue = tuple(line.statement for line in lines if line.layer == PROLOGUE)
    builder = LayerBuilder(
        model=model,
        makers=makers,
        prologue=prologue,
        crossing=frozenset(crossing),
        parameters=parameters,
    )
    return LayerGraph(
        model_name=model_name,
        fingerprint=fingerprint,
        micro_batch_size=micro_batch_size,
        batch=tuple(_batch_spec(key, value) for key, value in batch.items()),
        loss_keys=analysis.loss_keys,
        prologue=prologue,
        layers=tuple(
            builder.build(name, group) for name, group in zip(names, grouped, strict=True)
        ),
        tensors=tuple(boundary_spec(makers[name]) for name in crossing),
        parameters=tuple(parameters.values()),
        num_random_operators=sum(facts.num_random_operators for facts in analysis.facts),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        divides_backward=analysis.divides_backward,
    )


def _number_random(statements: Sequence[Statement], facts: Sequence[Facts]) -> list[Statement]:
    """Number random operators in execution order, dead statements included: eager runs them."""
    numbered, first = [], 0
    for statement, fact in zip(statements, facts, strict=True):
        count = fact.num_random_operators
        if count:
            statement = replace(statement, first_random_operator=first, num_random_operators=count)
        first += count
        numbered.append(statement)
    return numbered


def _place(statements: Sequence[Statement], facts: Sequence[Facts], model: nn.Module) -> list[Line]:
    live = live_statements(statements)
    statements, facts = [statements[i] for i in live], [facts[i] for i in live]
    begins = [
        statement.function == "layer"
        and next(model.get_submodule(statement.path).parameters(), None) is not None
        for statement in statements
    ]
    layers = assign_layers(statements, facts, begins)
    lines = [
        Line(statement=s, facts=f, layer=layer)
        for s, f, layer in zip(statements, facts, layers, strict=True)
    ]
    return _copy_parameters(lines)


def _copy_parameters(lines: Sequence[Line]) -> list[Line]:
    """Give every layer its own statement for a parameter that several layers' glue uses."""
    parameters = {line.statement.target: line for line in lines if _is_parameter(line)}
    used = {line.statement.target for line in lines}
    copies: dict[tuple[str, int], str] = {
        (name, line.layer): name for name, line in parameters.items()
    }
    result: list[Line] = []
    for line in lines:
        names: dict[str, str] = {}
        for name in dict.fromkeys(references(line.statement)):
            if name not in parameters:
                continue
            key = (name, line.layer)
            if key not in copies:
                copies[key] = _fresh(name, used)
                statement = replace(parameters[name].statement, target=copies[key])
                result.append(replace(parameters[name], statement=statement, layer=line.layer))
            names[name] = copies[key]
        result.append(replace(line, statement=renamed(line.statement, names)))
    return result


def _is_parameter(line: Line) -> bool:
    return line.statement.function == "parameter"


def _fresh(base: str, used: set[str]) -> str:
    name, number = base, 0
    while name in used:
        number += 1
        name = f"{base}_{number}"
    used.add(name)
    return name


def _crossing(lines: Sequence[Line], makers: Mapping[str, Line]) -> list[str]:
    """Names made in one layer and read in another, in order of creation."""
    crossing = {
        name
        for line in lines
        for name in references(line.statement)
        if makers[name].layer not in (PROLOGUE, line.layer)
    }
    return [line.statement.target for line in lines if line.statement.target in crossing]


def _rename_crossing(lines: list[Line], model_name: str) -> list[Line]:
    """Name glue that crosses after its layer: `transformer_h_0_add_1`, not `add_1`."""
    makers = {line.statement.target: line for line in lines}
    names = _layer_names(lines, model_name)
    used = set(makers)
    names_after = {
        name: _fresh(identifier(f"{names[makers[name].layer]}_{name}"), used)
        for name in _crossing(lines, makers)
        if makers[name].statement.function.startswith("aten.")
    }
    return [replace(line, statement=renamed(line.statement, names_after)) for line in lines]


def _layer_names(lines: Sequence[Line], model_name: str) -> list[str]:
    """The path of the module that begins each layer; `#2` marks its second call."""
    num_layers = 1 + max(line.layer for line in lines)
    names, calls = [model_name] * num_layers, Counter[str]()
    seen: set[int] = set()
    for line in lines:
        if line.statement.function == "layer" and line.layer not in (PROLOGUE, *seen):
            seen.add(line.layer)
            path = line.statement.path
            calls[path] += 1
            names[line.layer] = path if calls[path] == 1 else f"{path}#{calls[path]}"
    return names


def _batch_spec(key: str, value: torch.Tensor) -> TensorSpec:
    return TensorSpec(
        name=key,
        shape=tuple(value.shape),
        stride=value.stride(),
        dtype=str(value.dtype).removeprefix("torch."),
        requires_grad=value.requires_grad,
    )


def _parameter_specs(model: nn.Module, trained: frozenset[int]) -> dict[int, ParameterSpec]:
    """id() of each parameter -> its specification, in `named_parameters` order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        id(parameter): ParameterSpec(
            name=name,
            aliases=tuple(names[id(parameter)][1:]),
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trainable=id(parameter) in trained,
        )
        for name, parameter in model.named_parameters()
    }
