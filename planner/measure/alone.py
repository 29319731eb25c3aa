"""One layer run alone on fake tensors, as the runtime runs a stage, with its bytes followed.

A boundary input enters through a function of its own, and outputs are left to their gradient
edges, so that nothing is alive after forward but what backward needs. The storages that are alive
then are what is saved, whoever keeps them: autograd, a function's context or a closure. This module
knows one layer. It does not know graphs of layers, devices or seconds.
"""

import weakref
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from planner.graph import LayerGraph, StageCode, TensorSpec
from planner.measure.counter import KernelCounter
from planner.passages import Entry, Exit
from planner.plan.code import Statement, references
from planner.profile import Moment, OperatorCount
from planner.storages import storage_key, tensors_in
from planner.trace import Context, run_statements

__all__ = ["Backward", "Forward", "LayerAlone"]


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage by weak reference."""

    reference: "weakref.ref[torch.UntypedStorage]"
    key: int
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Storage":
        storage = tensor.untyped_storage()
        return cls(weakref.ref(storage), storage._cdata, storage.nbytes())

    @property
    def is_alive(self) -> bool:
        return self.reference() is not None

    @property
    def identity(self) -> int:
        """Of the storage, dead or alive: a key can come back with another storage. All plain weak
        references to an object are one, for as long as this one holds it."""
        return id(self.reference)


class _Values(dict[str, Any]):
    """Values by name, of which prologue statements' storages are remembered, weakly."""

    def __init__(self, prologue: frozenset[str]) -> None:
        super().__init__()
        self._prologue = prologue
        self._made: dict[str, _Storage] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name in self._prologue:
            for position, tensor in enumerate(tensors_in(value)):
                self._made[f"{name}.{position}"] = _Storage.of(tensor)

    def storages(self) -> dict[int, str]:
        """Key of a storage that is alive -> the first statement and position that made it."""
        return {s.key: name for name, s in reversed(self._made.items()) if s.is_alive}

    def made_for(
        self, code: Sequence[Statement], apart: Iterable[_Storage]
    ) -> list[tuple[str, int]]:
        """(statement and position, bytes) of what statements behind the prologue read."""
        others = {storage.identity for storage in apart}
        read = {n for s in code if s.target not in self._prologue for n in references(s)}
        found: dict[int, tuple[str, int]] = {}
        for name, storage in self._made.items():
            if name.partition(".")[0] in read and storage.identity not in others:
                found.setdefault(storage.identity, (name, storage.num_bytes))
        return list(found.values())

    def saved(self, apart: Container[int]) -> tuple[tuple[str, int], ...]:
        """(statement and position, bytes) of what is alive, less `apart`."""
        names = {key: name for key, name in self.storages().items() if key not in apart}
        return tuple((name, self._made[name].num_bytes) for name in names.values())[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What a forward made and kept."""

    kernels: tuple[OperatorCount, ...]
    moments: tuple[Moment, ...]
    saved_bytes: int
    saved_tensors: tuple[str, ...]
    saved_prologue: tuple[tuple[str, int], ...]
    prologue: tuple[tuple[str, int], ...]
    output_storages: tuple[tuple[str, int], ...]
    changed_buffer_bytes: int
    counter: KernelCounter
    root: Tensor | None
    """Where backward begins, if there is one."""
    gradients: dict[str, Tensor]
    """Of outputs; backward takes them away."""
    kept: dict[str, "weakref.ref[torch.UntypedStorage]"]
    """Inputs and outputs that backward reads."""
    sink: dict[str, Tensor]

    def given_to_backward(self) -> dict[str, torch.UntypedStorage]:
        """What backward reads of inputs and outputs, and gradients of outputs."""
        found = {f"gradient:{n}": g.untyped_storage() for n, g in self.gradients.items()}
        for name, reference in self.kept.items():
            storage = reference()
            if storage is not None:
                found[name] = storage
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """What a backward did."""

    kernels: tuple[OperatorCount, ...] = ()
    moments: tuple[Moment, ...] = ()
    """Above what is alive when it begins."""
    passed_gradients: tuple[tuple[str, str], ...] = ()
    strides: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    """Inputs whose gradients it found -> their layout; None where it is the input's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAlone:
    """A layer of a model on fake tensors; to be run under the mode that they belong to."""

    model: nn.Module
    graph: LayerGraph
    stage: StageCode
    context: Context
    gradient_strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Outputs whose gradients come in another layout than the outputs' own."""

    def forward(self, *, saving: bool = True) -> Forward:
        """Run forward; without `saving`, autograd lets go of what it saves."""
        sink: dict[str, Tensor] = {}
        values = _Values(self._prologue())
        self._enter(values, sink)
        batch = {key: torch.empty_like(self.context.batch[key]) for key in self.stage.batch_keys}
        named = {name: _Storage.of(tensor) for name, tensor in (*values.items(), *batch.items())}
        state = self._state()
        counter = KernelCounter((*state, *batch.values()))
        counter.give({name: tensor.untyped_storage() for name, tensor in values.items()})
        counter.restart()
        versions = [(buffer, buffer._version) for buffer in self._buffers()]
        context = replace(self.context, batch=batch)
        with _hooks(saving=saving), counter:
            run_statements(self.stage.code, values, context, keep=self.stage.outputs)
        outputs = {name: values[name] for name in self.stage.outputs}
        made = {name: _Storage.of(tensor) for name, tensor in outputs.items()}
        of_state = {storage_key(tensor) for tensor in state}
        prologue = values.made_for(self.stage.code, [*map(_Storage.of, state), *named.values()])
        named = {name: storage for name, storage in named.items() if storage.is_alive}
        output_storages = _owned(made, named, values.storages(), of_state)
        root, gradients = self._root(outputs)
        moments = counter.moments()
        now = self._buffers()
        kept_buffers = set(map(id, now))
        changed = [
            buffer
            for buffer, version in versions
            if id(buffer) not in kept_buffers or counter.changes(buffer, version)
        ]
        counter.exist(now)  # a new one takes the place of an old one
        for holder in (values, batch, outputs):
            holder.clear()
        named |= made
        named = {name: storage for name, storage in named.items() if storage.is_alive}
        kept = list({storage.key: name for name, storage in reversed(named.items())}.values())[::-1]
        keys = {named[name].key for name in kept}
        apart = sum(named[name].num_bytes for name in kept if counter.follows(named[name].key))
        return Forward(
            kernels=counter.kernels,
            moments=moments,
            saved_bytes=counter.live_bytes - apart,
            saved_tensors=tuple(kept),
            saved_prologue=values.saved(of_state | keys),
            prologue=tuple(prologue),
            output_storages=output_storages,
            changed_buffer_bytes=sum(buffer.nbytes for buffer in changed),
            counter=counter,
            root=root,
            gradients=gradients,
            kept={name: named[name].reference for name in kept},
            sink=sink,
        )

    def backward(self, forward: Forward) -> Backward:
        """Backward from gradients of ones; parameters' gradients are added to what is there."""
        if forward.root is None:
            return Backward()
        parameters = [self.model.get_parameter(name) for name in self.stage.parameters]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        begin, counter = torch.ones_like(forward.root), forward.counter
        counter.exist([begin, *(p.grad for p in trained if p.grad is not None)])
        counter.give(forward.given_to_backward())
        given = {name: _Storage.of(tensor) for name, tensor in forward.gradients.items()}
        before = counter.restart()
        try:
            with counter:
                torch.autograd.backward([forward.root], [begin])
        finally:
            for parameter in trained:
                parameter.grad = None
        owners = {storage.key: name for name, storage in given.items() if storage.is_alive}
        found = {name: owners.get(storage_key(t), "") for name, t in forward.sink.items()}
        return Backward(
            kernels=counter.kernels,
            moments=counter.moments(before),
            passed_gradients=tuple((name, owner) for name, owner in found.items() if owner),
            strides={
                name: _other_layout(tensor, self.graph.tensor_specs[name].stride)
                for name, tensor in forward.sink.items()
            },
        )

    def _state(self) -> list[Tensor]:
        """Parameters and buffers of the modules it calls and of its glue: not the whole model's,
        or a model of many layers would take the square of them.
        """
        model = self.model
        found: list[Tensor] = [model.get_parameter(name) for name in self.stage.parameters]
        for statement in self.stage.code:
            if statement.function == "layer":
                found += model.get_submodule(statement.path).buffers()
            elif statement.function == "buffer":
                found.append(model.get_buffer(statement.arguments[0]))
        return found

    def _prologue(self) -> frozenset[str]:
        targets = {statement.target for statement in self.graph.prologue}
        return frozenset(targets.intersection(s.target for s in self.stage.code))

    def _buffers(self) -> list[Tensor]:
        """Of the modules that the layer calls."""
        paths = [s.path for s in self.stage.code if s.function == "layer"]
        buffers = [b for path in paths for b in self.model.get_submodule(path).buffers()]
        return list({id(buffer): buffer for buffer in buffers}.values())

    def _enter(self, values: dict[str, Any], sink: dict[str, Tensor]) -> None:
        """The inputs; a layer that changes one works on a copy, which counts as the input."""
        specs, anchor = self.graph.tensor_specs, torch.zeros((), requires_grad=True)
        for name in self.stage.inputs:
            tensor = _empty(specs[name])
            if specs[name].requires_grad:
                copy = name in self.stage.mutated_inputs
                tensor = Entry.apply(anchor, tensor, sink, name, copy)  # type: ignore[no-untyped-call]
            values[name] = tensor

    def _root(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Where backward begins, and the gradients that enter it."""
        specs = self.graph.tensor_specs
        tensors = {
            name: tensor
            for name, tensor in outputs.items()
            if tensor.requires_grad and (name == "loss" or specs[name].requires_grad)
        }
        if not tensors:
            return None, {}
        gradients = {name: self._gradient(name, tensor) for name, tensor in tensors.items()}
        return Exit.apply(gradients, *tensors.values()), gradients  # type: ignore[no-untyped-call]

    def _gradient(self, name: str, output: Tensor) -> Tensor:
        if name not in self.gradient_strides:
            return torch.ones_like(output)
        gradient = output.new_empty_strided(output.shape, self.gradient_strides[name])
        return gradient.fill_(1)


def _other_layout(gradient: Tensor, expected: tuple[int, ...]) -> tuple[int, ...] | None:
    """The gradient's strides, if it fills its memory and lies there in another order than its
    tensor does. Strides of dimensions of one element mean nothing."""
    counting = [dimension for dimension, size in enumerate(gradient.shape) if size > 1]
    strides, length = gradient.stride(), 1
    if all(strides[dimension] == expected[dimension] for dimension in counting):
        return None
    for dimension in sorted(counting, key=strides.__getitem__):
        if strides[dimension] != length:
            return None
        length *= gradient.shape[dimension]
    return tuple(strides)


def _owned(
    outputs: Mapping[str, _Storage],
    given: Mapping[str, _Storage],
    prologue: Mapping[int, str],
    of_state: Container[int],
) -> tuple[tuple[str, int], ...]:
    """Per output the name of what owns its storage, and its bytes; no name for the model's own."""
    owners = {storage.key: name for name, storage in reversed([*given.items(), *outputs.items()])}
    owners |= {key: name for key, name in prologue.items() if owners.get(key) not in given}
    return tuple(
        ("" if s.key in of_state else owners[s.key], s.num_bytes) for s in outputs.values()
    )


def _empty(spec: TensorSpec) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device="cpu")


def _hooks(*, saving: bool) -> AbstractContextManager[object]:
    if saving:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_let_go, _let_go)


def _let_go(_: Any) -> Any:
    """A saved-tensor hook: forward without backward keeps nothing."""
