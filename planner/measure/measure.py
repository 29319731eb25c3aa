"""Profile every layer of a traced model by running it, alone, on fake tensors.

A layer runs as a stage of its own would run: its inputs are detached, and require a gradient only
where the graph says so. Layers with one signature run once, and their backward once more for each
other layout in which later layers make the gradients of its outputs. Counts do not depend on what
ran before: fake kernels do not answer from memory, and no garbage is collected. This module knows
runs and counts. It does not know devices: it has no seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import disable_fake_tensor_cache

from planner.errors import TraceError
from planner.graph import LayerGraph, LayerNode, StageCode
from planner.measure.alone import Backward, LayerAlone
from planner.measure.collection import no_collection
from planner.measure.redraws import NewDraws
from planner.measure.summary import summary
from planner.profile import LayerMemory, LayerProfile, Moment, Profile
from planner.trace import TracedModel
from planner.trace.fake import fake_run

__all__ = ["measure"]

_GRADIENT = "gradient:"
_Layouts = tuple[tuple[int, ...] | None, ...]
"""Strides of the gradient of each of a layer's outputs; None where they are the output's own."""


def measure(
    traced: TracedModel,
    micro_batch_size: int,
    *,
    in_short: bool = True,
    graph: LayerGraph | None = None,
) -> Profile:
    """Counts of every layer for one micro-batch; of `graph`, or of what the model is traced into.

    Prologue statements that a layer needs are part of its counts. Without `in_short` kernels and
    the bytes that are live after each stand one by one, and peaks are left to `summary`.

    Raises:
        TraceError: a layer that traced does not run on its own.
    """
    graph = graph or traced.layer_graph(micro_batch_size)
    runs = _Runs(
        traced=traced, graph=graph, batch=traced.fake_batch(micro_batch_size), known={}, inner={}
    )
    stages = [graph.stage_code(index, index) for index in range(len(graph.layers))]
    for layer, stage in zip(graph.layers, stages, strict=True):
        if layer.signature not in runs.known:
            runs.known[layer.signature] = runs.measured(layer, stage)
    profiles: list[LayerProfile] = []
    known: dict[tuple[str, _Layouts], LayerProfile] = {}
    for layer, stage, layouts in zip(graph.layers, stages, runs.layouts(stages), strict=True):
        first, key = runs.known[layer.signature], (layer.signature, layouts)
        if key not in known:
            profile = runs.with_inner(first, layouts)
            known[key] = summary(profile) if in_short else profile
        profiles.append(_renamed(first.layer, first.stage, known[key], layer, stage))
    return Profile(micro_batch_size=micro_batch_size, layers=tuple(profiles))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """A layer that ran alone."""

    layer: LayerNode
    stage: StageCode
    profile: LayerProfile
    backward: Backward
    """From gradients that are laid out as the outputs are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """Runs of one model's layers, and what they have found so far."""

    traced: TracedModel
    graph: LayerGraph
    batch: Mapping[str, torch.Tensor]
    known: dict[str, _Measured]
    """By signature."""
    inner: dict[tuple[str, _Layouts], Backward]
    """From gradients of other layouts."""

    def measured(self, layer: LayerNode, stage: StageCode) -> _Measured:
        run = self._alone(stage, {})
        with self._running(layer):
            unsaved = run.forward(saving=False)
            forward = run.forward()
            with NewDraws() as new_draws:
                backward = run.backward(forward)
        if new_draws.found:
            raise TraceError(
                f"layer {layer.name!r} draws random numbers in backward that its forward did not "
                "draw (torch.utils.checkpoint with preserve_rng_state=False, or an autograd "
                "function that draws in its backward): no two runs would be equal",
                hint="let checkpoint preserve the state, or draw in forward and save what was "
                "drawn",
            )
        specs = self.graph.parameter_specs
        profile = LayerProfile(
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
        return _Measured(layer=layer, stage=stage, profile=profile, backward=backward)

    def layouts(self, stages: list[StageCode]) -> list[_Layouts]:
        """Of every layer, if all of the model were one stage.

        Backward goes from the last layer to the first. What several layers read has a sum for its
        gradient, which is laid out as its first summand is: that of the last reader.
        """
        made: dict[str, tuple[int, ...] | None] = {}
        found: list[_Layouts] = []
        for layer, stage in zip(reversed(self.graph.layers), reversed(stages), strict=True):
            layouts = tuple(made.get(name) for name in layer.outputs)
            first = self.known[layer.signature]
            names = dict(zip(first.stage.inputs, stage.inputs, strict=True))
            for name, strides in self._backward(first, layouts).strides.items():
                made.setdefault(names[name], strides)
            found.append(layouts)
        return found[::-1]

    def with_inner(self, first: _Measured, layouts: _Layouts) -> LayerProfile:
        """The profile of a layer in the midst of a stage."""
        memory, inner = first.profile.memory, self._backward(first, layouts)
        assert memory is not None
        if inner.moments == first.backward.moments:
            return first.profile
        return replace(first.profile, memory=replace(memory, inner_backward=inner.moments))

    def _backward(self, first: _Measured, layouts: _Layouts) -> Backward:
        if not any(layouts):
            return first.backward
        key = first.layer.signature, layouts
        if key not in self.inner:
            outputs = zip(first.layer.outputs, layouts, strict=True)
            run = self._alone(first.stage, {n: strides for n, strides in outputs if strides})
            with self._running(first.layer):
                self.inner[key] = run.backward(run.forward())
        return self.inner[key]

    def _alone(self, stage: StageCode, strides: Mapping[str, tuple[int, ...]]) -> LayerAlone:
        return LayerAlone(
            model=self.traced.model,
            graph=self.graph,
            stage=stage,
            context=self.traced.context(self.batch),
            gradient_strides=strides,
        )

    @contextmanager
    def _running(self, layer: LayerNode) -> Iterator[None]:
        mode = self.traced.mode
        try:
            with fake_run(mode), disable_fake_tensor_cache(mode), no_collection():
                yield
        except Exception as error:
            raise TraceError(
                f"layer {layer.name!r} does not run on its own: {type(error).__name__}: {error}",
                hint="list the modules that run in sequence: `layers = [...]` in the model file",
            ) from None


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
            inner_backward=(
                None if memory.inner_backward is None else moments(memory.inner_backward)
            ),
        ),
    )
