"""One layer of the LayerGraph out of its lines: what it reads, makes, uses and is equal to.

It knows one layer at a time. It does not know how lines were given to layers.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner.errors import TraceError
from planner.graph import LayerNode, ParameterSpec, TensorSpec
from planner.plan.code import Reference, Statement, references
from planner.trace.analyse import Facts
from planner.trace.assign import PROLOGUE

__all__ = ["LayerBuilder", "Line", "boundary_spec", "renamed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A statement with its facts and its layer."""

    statement: Statement
    facts: Facts
    layer: int


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same statement or argument with other names for what it refers to (and makes)."""
    match value:
        case Reference(name=name):
            return Reference(names.get(name, name))
        case Statement():
            return replace(
                value,
                target=names.get(value.target, value.target),
                arguments=tuple(renamed(item, names) for item in value.arguments),
                keywords=tuple((key, renamed(item, names)) for key, item in value.keywords),
            )
        case list() | tuple():
            return type(value)(renamed(item, names) for item in value)
        case dict():
            return {key: renamed(item, names) for key, item in value.items()}
        case slice():
            return slice(*(renamed(v, names) for v in (value.start, value.stop, value.step)))
    return value


def boundary_spec(line: Line) -> TensorSpec:
    assert line.facts.spec is not None, f"{line.statement} crosses layers but is no tensor"
    return replace(line.facts.spec, name=line.statement.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBuilder:
    model: nn.Module
    makers: Mapping[str, Line]
    prologue: Sequence[Statement]
    crossing: Set[str]
    parameters: Mapping[int, ParameterSpec]

    def build(self, name: str, lines: Sequence[Line]) -> LayerNode:
        code = tuple(line.statement for line in lines)
        made = {statement.target for statement in code}
        read = dict.fromkeys(name for statement in code for name in references(statement))
        inputs = tuple(
            name for name in read if name not in made and self.makers[name].layer != PROLOGUE
        )
        outputs = [n for n in (s.target for s in code) if n in self.crossing or n == "loss"]
        used = [parameter for line in lines for parameter in self._parameters_of(line)]
        specs = list(dict.fromkeys(self.parameters[id(parameter)] for parameter in used))
        return LayerNode(
            name=name,
            code=code,
            inputs=inputs,
            outputs=tuple(outputs),
            parameters=tuple(spec.name for spec in specs),
            buffer_bytes=self._buffer_bytes(code),
            mutated_inputs=self._mutated(name, lines, inputs),
            signature=self._signature(lines, inputs, outputs, specs),
        )

    def _parameters_of(self, line: Line) -> list[nn.Parameter]:
        statement = line.statement
        if statement.function == "parameter":
            return [self.model.get_parameter(statement.arguments[0])]
        if statement.function == "layer":
            return list(self.model.get_submodule(statement.path).parameters())
        return []

    def _closure(self, code: Sequence[Statement]) -> list[Statement]:
        """Prologue statements that the code needs, in order."""
        needed = {name for statement in code for name in references(statement)}
        found = []
        for statement in reversed(self.prologue):
            if statement.target in needed:
                found.append(statement)
                needed.update(references(statement))
        return found[::-1]

    def _buffer_bytes(self, code: Sequence[Statement]) -> int:
        buffers: list[torch.Tensor] = []
        for statement in [*self._closure(code), *code]:
            if statement.function == "buffer":
                buffers.append(self.model.get_buffer(statement.arguments[0]))
            elif statement.function == "layer":
                buffers += self.model.get_submodule(statement.path).buffers()
        unique = {id(buffer): buffer for buffer in buffers}
        return sum(buffer.numel() * buffer.element_size() for buffer in unique.values())

    def _mutated(
        self, layer_name: str, lines: Sequence[Line], inputs: tuple[str, ...]
    ) -> tuple[str, ...]:
        changed = frozenset[int]().union(*(line.facts.changed_storages for line in lines))
        mutated: list[str] = []
        for storage in changed:
            sharing = [name for name in inputs if storage in self.makers[name].facts.storages]
            if len(sharing) > 1:
                raise TraceError(
                    f"layer {layer_name!r} changes {sharing[0]!r} in place while it also reads "
                    f"{sharing[1]!r}, which shares its memory",
                    hint="write it without the in-place operation (inplace=False, x = x + 1)",
                )
            mutated += sharing
        return tuple(name for name in inputs if name in mutated)

    def _signature(
        self,
        lines: Sequence[Line],
        inputs: Sequence[str],
        outputs: Sequence[str],
        specs: Sequence[ParameterSpec],
    ) -> str:
        code = [line.statement for line in lines]
        numbers: dict[str, str] = {}
        text: list[str] = []
        for name in inputs:
            spec = boundary_spec(self.makers[name])
            numbers[name] = f"n{len(numbers)}"
            text.append(str(replace(spec, name=numbers[name])))
        for statement in [*self._closure(code), *code]:
            numbers[statement.target] = f"n{len(numbers)}"
            plain = replace(
                renamed(statement, numbers),
                path="",
                first_random_operator=0,
                arguments=()
                if statement.function == "parameter"
                else renamed(list(statement.arguments), numbers),
            )
            kind = ""
            if statement.function == "layer":
                kind = type(self.model.get_submodule(statement.path)).__qualname__
            text += [f"{plain} {kind}", *self.makers[statement.target].facts.operators]
        for name in outputs:
            made = self.makers[name].facts.spec
            text.append(str(replace(made, name=numbers[name]) if made is not None else name))
        text += [str((spec.shape, spec.dtype, spec.trainable)) for spec in specs]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
