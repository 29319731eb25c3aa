"""Profile every layer of a traced model by running it, alone, on fake tensors.

A layer runs as a stage of its own would run: its inputs are detached, and require a gradient only
where the graph says so. Layers with one signature run once. Counts do not depend on what ran
before: fake kernels do not answer from memory, and no garbage is collected. This module knows runs
and counts. It does not know devices: it has no seconds.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

from planner.errors import TraceError
from planner.graph import LayerGraph, LayerNode, StageCode
from planner.measure.alone import LayerAlone
from planner.measure.collection import no_collection
from planner.measure.redraws import NewDraws
from planner.measure.summary import summary
from planner.profile import LayerMemory, LayerProfile, Moment, Profile
from planner.trace import TracedModel
from planner.trace.fake import fake_run

__all__ = ["measure"]

_GRADIENT = "gradient:"


def measure(traced: TracedModel, micro_batch_size: int, *, in_short: bool = True) -> Profile:
    """Counts of every layer for one micro-batch.

    Prologue statements that a layer needs are part of its counts. Without `in_short` kernels and
    the bytes that are live after each stand one by one, and peaks are left to `summary`.

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
            known[layer.signature] = layer, stage, summary(profile) if in_short else profile
        profiles.append(_renamed(*known[layer.signature], layer, stage))
    return Profile(micro_batch_size=micro_batch_size, layers=tuple(profiles))


def _measure_layer(
    traced: TracedModel,
    graph: LayerGraph,
    layer: LayerNode,
    stage: StageCode,
    batch: Mapping[str, torch.Tensor],
) -> LayerProfile:
    run = LayerAlone(model=traced.model, graph=graph, stage=stage, context=traced.context(batch))
    try:
        with fake_run(traced.mode), disable_fake_tensor_cache(traced.mode), no_collection():
            unsaved = run.forward(saving=False)
            forward = run.forward()
            with NewDraws() as new_draws:
                backward = run.backward(forward)
    except Exception as error:
        raise TraceError(
            f"layer {layer.name!r} does not run on its own: {type(error).__name__}: {error}",
            hint="list the modules that run in sequence: `layers = [...]` in the model file",
        ) from None
    if new_draws.found:
        raise TraceError(
            f"layer {layer.name!r} draws random numbers in backward that its forward did not draw "
            "(torch.utils.checkpoint with preserve_rng_state=False, or an autograd function that "
            "draws in its backward): no two runs would be equal",
            hint="let checkpoint preserve the state, or draw in forward and save what was drawn",
        )
    specs = graph.parameter_specs
    return LayerProfile(
        name=layer.name,
        forward=forward.kernels,
        backward=backward.kernels,
        parameter_bytes=sum(specs[name].num_bytes for name in layer.parameters),
        saved_bytes=forward.saved_bytes,
        saved_tensors=forward.saved_tensors,
        forward_transient_bytes=0,
        backward_transient_bytes=0,
        memory=LayerMemory(
            prologue=forward.prologue,
            saved_prologue=forward.saved_prologue,
            output_storages=forward.output_storages,
            forward=forward.moments,
            unsaved=unsaved.moments,
            backward=backward.moments,
            passed_gradients=backward.passed_gradients,
            changed_buffer_bytes=forward.changed_buffer_bytes,
        ),
        provenance=f"counted on fake CPU tensors, torch {torch.__version__}",
    )


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
    for one, other in zip(measured_stage.code, stage.code, strict=True):
        names.setdefault(one.target, other.target)

    def renamed(name: str) -> str:
        if name.startswith(_GRADIENT):
            return _GRADIENT + renamed(name.removeprefix(_GRADIENT))
        target, point, position = name.partition(".")
        return names.get(target, target) + point + position

    def sizes(found: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((renamed(name), size) for name, size in found)

    def moments(found: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(replace(one, held=tuple(map(renamed, one.held))) for one in found)

    memory = profile.memory
    assert memory is not None
    return replace(
        profile,
        name=layer.name,
        saved_tensors=tuple(map(renamed, profile.saved_tensors)),
        memory=replace(
            memory,
            prologue=sizes(memory.prologue),
            saved_prologue=sizes(memory.saved_prologue),
            output_storages=sizes(memory.output_storages),
            forward=moments(memory.forward),
            unsaved=moments(memory.unsaved),
            passed_gradients=tuple(
                (renamed(name), renamed(owner)) for name, owner in memory.passed_gradients
            ),
            backward=moments(memory.backward),
        ),
    )
