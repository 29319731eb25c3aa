"""Profile every layer of a traced model by running it, alone, on fake tensors.

A layer runs as a stage of its own would run: its inputs are detached, and require a gradient only
where the graph says so. Layers with one signature run once. This module knows runs and counts. It
does not know devices: it has no seconds.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner.errors import TraceError
from planner.graph import LayerGraph, LayerNode, StageCode, TensorSpec
from planner.measure.counter import KernelCounter, SavedTensors
from planner.profile import LayerProfile, OperatorCount, Profile
from planner.storages import storage_key
from planner.trace import Context, TracedModel, run_statements
from planner.trace.fake import fake_run

__all__ = ["measure"]


def measure(traced: TracedModel, micro_batch_size: int) -> Profile:
    """Counts of every layer for one micro-batch.

    Prologue statements that a layer needs are part of its counts.

    Raises:
        TraceError: a layer that traced does not run on its own.
    """
    graph = traced.layer_graph(micro_batch_size)
    batch = traced.fake_batch(micro_batch_size)
    known: dict[str, tuple[LayerNode, StageCode, LayerProfile]] = {}
    profiles: list[LayerProfile] = []
    for index, layer in enumerate(graph.layers):
        stage = graph.stage_code(index, index)
        if layer.signature not in known:
            profile = _measure_layer(traced, graph, layer, stage, batch)
            known[layer.signature] = (layer, stage, profile)
        profiles.append(_renamed(*known[layer.signature], layer, stage))
    return Profile(micro_batch_size=micro_batch_size, layers=tuple(profiles))


def _measure_layer(
    traced: TracedModel,
    graph: LayerGraph,
    layer: LayerNode,
    stage: StageCode,
    batch: Mapping[str, torch.Tensor],
) -> LayerProfile:
    run = _Run(model=traced.model, graph=graph, stage=stage, context=traced.context(batch))
    try:
        with fake_run(traced.mode):
            forward = run.forward()
            backward = run.backward(forward)
    except Exception as error:
        raise TraceError(
            f"layer {layer.name!r} does not run on its own: {type(error).__name__}: {error}",
            hint="list the modules that run in sequence: `layers = [...]` in the model file",
        ) from None
    finally:
        for parameter in traced.model.parameters():
            parameter.grad = None
    if any(count.draws for count in backward.counts):
        raise TraceError(
            f"layer {layer.name!r} draws random numbers again in backward (dropout inside "
            "torch.utils.checkpoint): they could not be those of its forward",
            hint="leave checkpointing to the plan: take it out of the layer, and plan with "
            "--recompute",
        )
    specs = graph.parameter_specs
    return LayerProfile(
        name=layer.name,
        forward=forward.counts,
        backward=backward.counts,
        parameter_bytes=sum(specs[name].num_bytes for name in layer.parameters),
        saved_bytes=forward.saved_bytes,
        saved_tensors=forward.saved_tensors,
        forward_transient_bytes=forward.peak_bytes,
        backward_transient_bytes=backward.peak_bytes,
        provenance=f"counted on fake CPU tensors, torch {torch.__version__}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    outputs: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    counter: KernelCounter
    counts: tuple[OperatorCount, ...]
    saved_bytes: int
    saved_tensors: tuple[str, ...]
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Backward:
    counts: tuple[OperatorCount, ...]
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One layer run alone, forward and then backward."""

    model: nn.Module
    graph: LayerGraph
    stage: StageCode
    context: Context

    def forward(self) -> _Forward:
        specs = self.graph.tensor_specs
        inputs = {name: _input(specs[name]) for name in self.stage.inputs}
        # A layer that changes its input works on a copy; the copy counts as the input.
        values: dict[str, Any] = {
            name: tensor.clone() if name in self.stage.mutated_inputs else tensor
            for name, tensor in inputs.items()
        }
        given = dict(values)
        state = [*self.model.parameters(), *self.model.buffers()]
        existing = [*state, *given.values(), *inputs.values(), *self.context.batch.values()]
        saved = SavedTensors()
        with ExitStack() as stack:
            stack.enter_context(saved.hooks)
            counter = stack.enter_context(KernelCounter(existing))
            run_statements(self.stage.code, values, self.context, keep=self.stage.outputs)
        outputs = {name: values[name] for name in self.stage.outputs}
        named = {**given, **outputs}
        del values, given
        for key in self.stage.batch_keys:
            named[key] = self.context.batch[key]
        kept = saved.storages()
        names = {storage_key(tensor): name for name, tensor in reversed(named.items())}
        apart = {*names, *map(storage_key, state)}
        return _Forward(
            outputs=outputs,
            inputs=inputs,
            counter=counter,
            counts=counter.counts,
            saved_bytes=sum(size for key, size in kept.items() if key not in apart),
            saved_tensors=tuple(name for key, name in names.items() if key in kept)[::-1],
            peak_bytes=counter.peak_bytes,
        )

    def backward(self, forward: _Forward) -> _Backward:
        """Backward from gradients of ones; a parameter's gradient is dropped once it is made."""
        roots = {
            name: tensor
            for name, tensor in forward.outputs.items()
            if name == "loss" or self.graph.tensor_specs[name].requires_grad
        }
        trainable = {spec.name for spec in self.graph.parameters if spec.trainable}
        wanted: list[torch.Tensor] = [x for x in forward.inputs.values() if x.requires_grad]
        parameters = [
            self.model.get_parameter(name) for name in self.stage.parameters if name in trainable
        ]
        wanted += parameters
        if not roots or not wanted:
            return _Backward(counts=(), peak_bytes=0)
        gradients = [torch.ones_like(tensor) for tensor in roots.values()]
        counter = forward.counter
        before = counter.restart()
        handles = [p.register_post_accumulate_grad_hook(_drop) for p in parameters]
        with counter:
            torch.autograd.backward(list(roots.values()), gradients, inputs=wanted)
        for handle in handles:
            handle.remove()
        return _Backward(
            counts=counter.counts,
            peak_bytes=counter.peak_bytes - before,
        )


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _input(spec: TensorSpec) -> torch.Tensor:
    tensor = torch.empty_strided(
        spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device="cpu"
    )
    return tensor.requires_grad_(spec.requires_grad)


def _renamed(
    measured: LayerNode,
    measured_stage: StageCode,
    profile: LayerProfile,
    layer: LayerNode,
    stage: StageCode,
) -> LayerProfile:
    """The profile of an equal layer, with this layer's own names."""
    names = dict(zip(measured_stage.inputs, stage.inputs, strict=True))
    names.update(zip(measured.outputs, layer.outputs, strict=True))
    saved = tuple(names.get(name, name) for name in profile.saved_tensors)
    return replace(profile, name=layer.name, saved_tensors=saved)
