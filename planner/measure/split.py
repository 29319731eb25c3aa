"""Which kernels of each layer tensor parallelism divides, and the all-reduces that this costs.

Every distinct layer runs once more on fake tensors, under a recorder. Classes of axes are then
chosen to be split that begin and end in weights: a product makes a split tensor, everything up to
the next product works on it, and what that product makes is a sum over ranks: one all-reduce. What
passes between layers stays whole, unless its maker and all of its readers would split it alike.
Shoeybi et al., "Megatron-LM" (2019), split transformers so by hand; here rules of operators decide,
and no layer is known by its name or class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.errors import TraceError
from planner.graph import LayerGraph, LayerNode, StageCode
from planner.measure.split_recorder import SplitRecorder, Splits
from planner.profile import LayerProfile, LayerSplit, Profile
from planner.trace import TracedModel, run_statements
from planner.trace.fake import fake_run

__all__ = ["with_splits"]


@dataclass(slots=True, kw_only=True)
class _Distinct:
    """One distinct layer, what was recorded of it, and the names that its equals use."""

    recorder: SplitRecorder
    splits: Splits
    layer: LayerNode
    stage: StageCode


def with_splits(traced: TracedModel, profile: Profile) -> Profile:
    """The profile with what tensor parallelism would divide of every layer.

    It fills `OperatorCount.split`, the bytes of all-reduces and `LayerProfile.split`; everything
    else stays. Degrees are chosen later (`planner.cost.split_profile`).

    Raises:
        TraceError: a layer that traced does not run on its own.
    """
    graph = traced.layer_graph(profile.micro_batch_size)
    batch = traced.fake_batch(profile.micro_batch_size)
    distinct: dict[str, _Distinct] = {}
    stages = [graph.stage_code(index, index) for index in range(len(graph.layers))]
    for layer, stage in zip(graph.layers, stages, strict=True):
        if layer.signature not in distinct:
            recorder = _record(traced, graph, layer, stage, batch)
            distinct[layer.signature] = _Distinct(
                recorder=recorder, splits=recorder.splits(), layer=layer, stage=stage
            )
    _agree(graph, stages, distinct)
    return replace(
        profile,
        layers=tuple(
            _filled(graph, layer, stage, distinct[layer.signature], found)
            for layer, stage, found in zip(graph.layers, stages, profile.layers, strict=True)
        ),
    )


def _record(
    traced: TracedModel,
    graph: LayerGraph,
    layer: LayerNode,
    stage: StageCode,
    batch: Mapping[str, torch.Tensor],
) -> SplitRecorder:
    parameters = {name: traced.model.get_parameter(name) for name in stage.parameters}
    try:
        with fake_run(traced.mode):
            values = _inputs(graph, stage)
            recorder = SplitRecorder(parameters, values)
            names = set(values)
            with recorder:
                run_statements(stage.code, values, traced.context(batch), keep=stage.outputs)
            outputs = {name: values[name] for name in stage.outputs}
            recorder.end_forward({n: x for n, x in outputs.items() if n not in names})
            roots = [
                tensor
                for name, tensor in outputs.items()
                if tensor.requires_grad
                and (name == "loss" or graph.tensor_specs[name].requires_grad)
            ]
            gradients = [torch.ones_like(tensor) for tensor in roots]
            values.clear()
            outputs.clear()
            trained = {name: p for name, p in parameters.items() if p.requires_grad}
            for parameter in trained.values():
                parameter.grad = torch.empty_like(parameter)
            recorder.begin_backward({n: p.grad for n, p in trained.items() if p.grad is not None})
            with recorder:
                if roots:
                    torch.autograd.backward(roots, gradients)
    except Exception as error:
        raise TraceError(
            f"layer {layer.name!r} does not run on its own: {type(error).__name__}: {error}",
            hint="list the modules that run in sequence: `layers = [...]` in the model file",
        ) from None
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    return recorder


def _inputs(graph: LayerGraph, stage: StageCode) -> dict[str, torch.Tensor]:
    """Boundary tensors; a layer that changes one works on a copy."""
    specs, values = graph.tensor_specs, {}
    for name in stage.inputs:
        spec = specs[name]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=dtype)
        if spec.requires_grad:
            tensor = _Entry.apply(torch.zeros((), requires_grad=True), tensor)  # type: ignore[no-untyped-call]
        values[name] = tensor
    return values


class _Entry(torch.autograd.Function):
    """Lets a tensor into the graph without a leaf, which would copy gradients."""

    @staticmethod
    def forward(_ctx: Any, _anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, *_: Any) -> Any:
        return None, None


def _agree(graph: LayerGraph, stages: list[StageCode], distinct: dict[str, _Distinct]) -> None:
    """Keep whole what passes between layers that would not all split it alike."""
    users: dict[str, list[tuple[_Distinct, str]]] = {tensor.name: [] for tensor in graph.tensors}
    for layer, stage in zip(graph.layers, stages, strict=True):
        first = distinct[layer.signature]
        for name, local in _names(first, layer, stage).items():
            if name in users and local in first.splits.boundary:
                users[name].append((first, local))
    undecided = set(users)
    while undecided:
        refused = {
            name
            for name in undecided
            if len({first.splits.boundary[local] for first, local in users[name]}) > 1
            or (not graph.tensor_specs[name].requires_grad)
        }
        if not refused:
            return
        undecided -= refused
        changed: dict[int, _Distinct] = {}
        for name in sorted(refused):
            for first, local in users[name]:
                if first.splits.boundary[local] is not None:
                    changed[id(first)] = first
                first.recorder.keep_whole(local)
        for first in changed.values():
            first.splits = first.recorder.splits()


def _names(first: _Distinct, layer: LayerNode, stage: StageCode) -> dict[str, str]:
    """A layer's boundary tensors -> the names that its recorded equal has for them."""
    names = dict(zip(stage.inputs, first.stage.inputs, strict=True))
    names.update(zip(layer.outputs, first.layer.outputs, strict=True))
    return names


def _filled(
    graph: LayerGraph, layer: LayerNode, stage: StageCode, first: _Distinct, profile: LayerProfile
) -> LayerProfile:
    splits, specs = first.splits, graph.parameter_specs
    own = dict(zip(first.stage.parameters, stage.parameters, strict=True))
    parameters = tuple(own[name] for name in splits.parameters)
    return replace(
        profile,
        forward=splits.forward,
        backward=splits.backward,
        forward_all_reduce_bytes=splits.forward_all_reduce_bytes,
        backward_all_reduce_bytes=splits.backward_all_reduce_bytes,
        split=LayerSplit(
            parameters=parameters,
            parameter_bytes=sum(specs[name].num_bytes for name in parameters),
            tensors=tuple(
                name
                for name, local in _names(first, layer, stage).items()
                if splits.boundary.get(local) is not None
            ),
            saved_share=splits.saved_share,
            forward_peaks=splits.forward_peaks,
            backward_peaks=splits.backward_peaks,
            pieces=splits.pieces,
        ),
    )
