"""The LayerGraph: a model as a sequence of layers, and the tensors that pass between them.

Every layer is the user's own module (or modules) called inside traced glue. A tensor read by a
layer other than the one that makes it is a *boundary tensor*; a skip connection is a boundary
tensor with a distant reader. This module knows structure and bytes. It does not know time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import networkx

from planner.plan.code import Statement, references

__all__ = [
    "DTYPE_BYTES",
    "LayerGraph",
    "LayerNode",
    "ParameterSpec",
    "StageCode",
    "TensorSpec",
    "reordered",
]

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of one micro-batch that passes between layers."""

    name: str
    shape: tuple[int, ...]
    """With the micro-batch size filled in."""
    stride: tuple[int, ...]
    dtype: str
    """torch's name without the prefix, e.g. `float32`."""
    requires_grad: bool
    """Whether its reader must send a gradient (error state) back to its maker."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """A parameter, known by the first of its names (`named_parameters` order)."""

    name: str
    aliases: tuple[str, ...] = ()
    """Its other names, where modules share it (tied weights)."""
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    """False where frozen, or where no gradient ever reaches it."""
    compute_dtype: str = ""
    """Of the copy that layers compute with, where that is not the parameter itself."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Of what layers compute with."""
        return self.num_elements * DTYPE_BYTES[self.compute_dtype or self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNode:
    """The smallest unit that the trace keeps whole."""

    name: str
    """Path of its module in the user's model."""
    code: tuple[Statement, ...]
    """In execution order. Prologue statements it needs are not repeated here."""
    inputs: tuple[str, ...]
    """Boundary tensors made by earlier layers that it reads (not batch inputs, not prologue)."""
    outputs: tuple[str, ...]
    """Boundary tensors it makes that later layers read; `loss` for the last layer."""
    parameters: tuple[str, ...]
    """Names of the parameters it uses; a tied parameter appears in each layer that uses it."""
    buffer_bytes: int
    mutated_inputs: tuple[str, ...] = ()
    """Inputs it changes in place: a stage that begins with it works on a copy."""
    signature: str
    """Equal for layers that are the same computation on the same shapes (profiled once)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCode:
    """The code of consecutive layers, complete with the prologue statements they need."""

    code: tuple[Statement, ...]
    inputs: tuple[str, ...]
    """Boundary tensors from earlier stages."""
    outputs: tuple[str, ...]
    """Boundary tensors later stages read; `loss` for the last stage."""
    batch_keys: tuple[str, ...]
    """Keys of the batch it loads."""
    parameters: tuple[str, ...]
    """In order of first use, each once."""
    mutated_inputs: tuple[str, ...]


def _looked_up() -> Any:
    """A table that the LayerGraph makes of its other fields."""
    return field(init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGraph:
    """A traced model at one micro-batch size."""

    model_name: str
    fingerprint: str
    """Of parameter names, shapes and dtypes, the module tree, and the inlined forwards."""
    micro_batch_size: int
    batch: tuple[TensorSpec, ...]
    """Every key of the user's batch; the name is the key; sizes of one micro-batch."""
    loss_keys: tuple[str, ...]
    """Keys that the loss may read: loaded by the last stage."""
    prologue: tuple[Statement, ...]
    """Cheap statements that depend on the batch and constants alone: recomputed where used."""
    layers: tuple[LayerNode, ...]
    """In execution order: every boundary tensor's maker precedes its readers."""
    tensors: tuple[TensorSpec, ...]
    """All boundary tensors, in order of creation."""
    parameters: tuple[ParameterSpec, ...]
    """In `named_parameters` order."""
    num_random_operators: int
    """Random operators in one whole forward."""
    buffer_bytes: int = 0
    """Of all buffers of the model's modules."""
    divides_backward: bool = True
    """Whether autograd can surely be asked for a part of the gradients at a time. Functions written
    in Python may refuse: checkpointing that re-enters autograd does."""
    tensor_specs: Mapping[str, TensorSpec] = _looked_up()
    parameter_specs: Mapping[str, ParameterSpec] = _looked_up()
    makers: Mapping[str, int] = _looked_up()
    """Boundary tensor -> index of the layer that makes it."""
    readers: Mapping[str, tuple[int, ...]] = _looked_up()
    """Boundary tensor -> indices of the layers that read it, ascending."""
    tied_parameters: Mapping[str, tuple[int, ...]] = _looked_up()
    """Parameter used by more than one layer -> those layers, ascending."""

    def __post_init__(self) -> None:
        # Made once: what asks once per layer must not take the square of the layers.
        readers = {tensor.name: () for tensor in self.tensors} | _users(
            layer.inputs for layer in self.layers
        )
        users = _users(layer.parameters for layer in self.layers)
        tables: dict[str, Mapping[str, Any]] = {
            "tensor_specs": {tensor.name: tensor for tensor in self.tensors},
            "parameter_specs": {parameter.name: parameter for parameter in self.parameters},
            "makers": {name: i for i, layer in enumerate(self.layers) for name in layer.outputs},
            "readers": readers,
            "tied_parameters": {name: found for name, found in users.items() if len(found) > 1},
        }
        for name, table in tables.items():
            object.__setattr__(self, name, MappingProxyType(table))

    def to_networkx(self) -> "networkx.DiGraph[int]":
        """Layers as nodes (index; attribute `layer`), summed boundary bytes on edges."""
        graph: networkx.DiGraph[int] = networkx.DiGraph()
        for index, layer in enumerate(self.layers):
            graph.add_node(index, layer=layer)
        specs, makers = self.tensor_specs, self.makers
        for name, readers in self.readers.items():
            for reader in readers:
                edge = (makers[name], reader)
                known = graph.get_edge_data(*edge, default={"tensors": (), "num_bytes": 0})
                graph.add_edge(
                    *edge,
                    tensors=(*known["tensors"], name),
                    num_bytes=known["num_bytes"] + specs[name].num_bytes,
                )
        return graph

    def stage_code(self, first: int, last: int) -> StageCode:
        """The code of layers first..last (inclusive)."""
        layers = self.layers[first : last + 1]
        body = [statement for layer in layers for statement in layer.code]
        needed = {name for statement in body for name in references(statement)}
        prologue: list[Statement] = []
        for statement in reversed(self.prologue):
            if statement.target in needed:
                prologue.append(statement)
                needed.update(references(statement))
        code = (*reversed(prologue), *body)
        made = {name for layer in layers for name in layer.outputs}
        keys = [s.arguments[0] for s in code if s.function == "batch"]
        if last == len(self.layers) - 1:
            keys += self.loss_keys
        return StageCode(
            code=code,
            inputs=_unique(n for layer in layers for n in layer.inputs if n not in made),
            outputs=_unique(
                name
                for layer in layers
                for name in layer.outputs
                if name == "loss" or any(reader > last for reader in self.readers[name])
            ),
            batch_keys=_unique(keys),
            parameters=_unique(name for layer in layers for name in layer.parameters),
            mutated_inputs=_unique(
                n for layer in layers for n in layer.mutated_inputs if n not in made
            ),
        )


def reordered(graph: LayerGraph, order: Sequence[int]) -> LayerGraph:
    """The same model with its layers in another order: place p holds layer `order[p]`.

    Every maker must stay before its readers, and the last layer last.
    """
    assert sorted(order) == list(range(len(graph.layers))), "not every layer once"
    place = {layer: index for index, layer in enumerate(order)}
    moved = replace(
        graph,
        layers=tuple(graph.layers[layer] for layer in order),
        tensors=tuple(sorted(graph.tensors, key=lambda t: place[graph.makers[t.name]])),
    )
    for name, readers in moved.readers.items():
        assert moved.makers[name] < min(readers, default=len(order)), f"{name} is read before made"
    return moved


def _users(names: Iterable[Iterable[str]]) -> dict[str, tuple[int, ...]]:
    """Name -> the layers that use it, ascending; `names` holds those of each layer."""
    found: dict[str, list[int]] = {}
    for index, used in enumerate(names):
        for name in used:
            found.setdefault(name, []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
