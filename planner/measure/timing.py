"""Time every distinct layer of a traced model on real tensors of a device.

Only the layer under test is on the device. This module knows what is run, how often, and in which
order. It does not know files or clusters.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from planner.compute_type import cast_tensor
from planner.errors import ModelFileError, RunError
from planner.graph import LayerGraph, LayerNode, TensorSpec
from planner.heap import keep_freed_memory
from planner.measure.clock import Clock, Seconds, seconds_of
from planner.measure.collection import no_collection
from planner.measure.layer_run import LayerRun, peak_bytes
from planner.measure.measure import measure
from planner.measure.measured import MeasuredLayer, MeasuredSize
from planner.measure.real_model import RealModel, random_values
from planner.measure.update import Update, measure_update
from planner.model_file import ModelFile, raised_at
from planner.precision import Precision
from planner.profile import LayerProfile
from planner.trace import Context, TracedModel

__all__ = ["OnLayer", "time_layers"]

_WARM_UPS = 3
"""Runs before the first that counts: kernels are chosen and memory is taken in them."""

OnLayer = Callable[[int, int, str], None]
"""Told, before each distinct layer: its number, how many there are, its name."""


def time_layers(
    traced: TracedModel,
    micro_batch_size: int,
    device: torch.device,
    *,
    num_repeats: int,
    on_layer: OnLayer | None = None,
) -> MeasuredSize:
    """Counts, seconds and peaks of every distinct layer for one micro-batch.

    A layer's figures are medians over `num_repeats` runs; in each, forward, backward and a forward
    under the conditions of recomputation follow each other. On a CPU the process keeps from now on
    what it frees, as the runtime does.

    Raises:
        TraceError, ModelFileError: the model cannot be traced or built.
        RunError: a layer does not fit on the device, or does not run on it.
    """
    if device.type == "cpu":
        keep_freed_memory()
    graph = traced.layer_graph(micro_batch_size)
    counted = measure(traced, micro_batch_size)
    session = _Session(
        model_file=traced.model_file,
        graph=graph,
        model=RealModel(traced.model_file, traced.precision, traced.keep_float32),
        batch=_real_batch(traced, micro_batch_size, device),
        precision=traced.precision,
        device=device,
        num_repeats=num_repeats,
        known={},
    )
    equal: dict[str, list[int]] = {}
    for index, layer in enumerate(graph.layers):
        equal.setdefault(layer.signature, []).append(index)
    found = []
    for number, (signature, indices) in enumerate(equal.items()):
        first = graph.layers[indices[0]]
        if on_layer is not None:
            on_layer(number, len(equal), first.name)
        layers = [graph.layers[index] for index in indices]
        gc.collect()
        with _failures(first.name, micro_batch_size, device), no_collection():
            times = session.time(indices[0], layers)
        found.append(
            MeasuredLayer(
                signature=signature,
                layers=tuple(layer.name for layer in layers),
                profile=_with_seconds(counted.layers[indices[0]], times),
                forward=times.forward,
                backward=times.backward,
                recompute=times.recompute,
                update=times.update.seconds,
                optimizer_bytes=times.update.state_bytes,
                forward_peak_bytes=times.peaks[0],
                backward_peak_bytes=times.peaks[1],
            )
        )
    return MeasuredSize(micro_batch_size=micro_batch_size, layers=tuple(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    forward: Seconds
    backward: Seconds
    recompute: Seconds
    update: Update
    peaks: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """Layers of one model, one after the other on one device."""

    model_file: ModelFile
    graph: LayerGraph
    model: RealModel
    batch: Mapping[str, Tensor]
    precision: Precision
    device: torch.device
    num_repeats: int
    known: dict[str, Tensor]
    """Boundary tensors of integers and booleans (indices, masks), as the layers made them."""

    def time(self, index: int, layers: list[LayerNode]) -> _Times:
        run = self._run(index)
        self._remember(run, layers)
        peaks = peak_bytes(run)
        samples = self._samples(run)
        update = measure_update(
            self._kept(run.parameters),
            self.model_file.build_optimizer,
            self.device,
            num_warm_ups=_WARM_UPS,
            num_repeats=self.num_repeats,
        )
        return _Times(
            forward=seconds_of(samples[0]),
            backward=seconds_of(samples[1]),
            recompute=seconds_of(samples[2]),
            update=update,
            peaks=peaks,
        )

    def _kept(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """What is updated: in mixed precision the masters, with gradients of their type."""
        if not self.precision.is_mixed:
            return parameters
        masters = []
        for parameter in parameters:
            masters.append(nn.Parameter(parameter.detach().float()))
            masters[-1].grad = torch.zeros_like(masters[-1])
        return masters

    def _run(self, index: int) -> LayerRun:
        graph = self.graph
        stage, specs = graph.stage_code(index, index), graph.tensor_specs
        model = self.model.with_parameters(stage.parameters, self.device)
        trainable = {spec.name for spec in graph.parameters if spec.trainable}
        run = LayerRun(
            stage=stage,
            context=Context(
                model=model,
                batch=self.batch,
                loss_fn=self.model_file.loss_fn,
                device=self.device,
            ),
            inputs={name: self._input(specs[name]) for name in stage.inputs},
            roots=tuple(n for n in stage.outputs if n == "loss" or specs[n].requires_grad),
            parameters=[model.get_parameter(n) for n in stage.parameters if n in trainable],
        )
        for parameter in run.parameters if self.precision.is_mixed else ():
            parameter.grad_dtype = None  # gradients are added to float32 sums
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return run

    def _input(self, spec: TensorSpec) -> Tensor:
        if spec.name in self.known:
            return self.known[spec.name]
        dtype = getattr(torch, spec.dtype)
        value = random_values(spec.shape, spec.stride, dtype, self.device)
        return value.requires_grad_(spec.requires_grad)

    def _remember(self, run: LayerRun, layers: list[LayerNode]) -> None:
        outputs = run.forward().outputs
        for layer in layers:
            for name, made in zip(layer.outputs, layers[0].outputs, strict=True):
                value = outputs[made]
                if not (value.is_floating_point() or value.is_complex()):
                    self.known[name] = value

    def _samples(self, run: LayerRun) -> tuple[list[float], list[float], list[float]]:
        """Seconds of each forward, backward and recompute that counts."""
        clock = Clock(self.device)
        forwards, backwards, recomputes = [], [], []
        for repeat in range(_WARM_UPS + self.num_repeats):
            marks: list[Any] = [clock.mark()]
            forward = run.forward()
            marks.append(clock.mark())
            if run.has_backward:
                root = run.root(forward, run.gradients(forward))
                begin = torch.ones_like(root)
                marks.append(clock.mark())
                root.backward(begin)
                marks.append(clock.mark())
                del root
            else:
                marks += [marks[-1], marks[-1]]
            del forward
            marks.append(clock.mark())
            forward = run.recompute()
            marks.append(clock.mark())
            clock.wait()
            del forward
            if repeat >= _WARM_UPS:
                forwards.append(clock.seconds_between(marks[0], marks[1]))
                backwards.append(clock.seconds_between(marks[2], marks[3]))
                recomputes.append(clock.seconds_between(marks[4], marks[5]))
        return forwards, backwards, recomputes


def _with_seconds(counted: LayerProfile, times: _Times) -> LayerProfile:
    return replace(
        counted,
        forward_seconds=times.forward.median,
        backward_seconds=times.backward.median,
        recompute_seconds=times.recompute.median,
        update_seconds=times.update.seconds.median,
        provenance=f"{counted.provenance}; seconds measured",
    )


def _real_batch(
    traced: TracedModel, micro_batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """The example batch; what could be wrong with it was found when the model was traced."""
    with torch.random.fork_rng(devices=[]):
        batch = traced.model_file.example_batch(micro_batch_size)
    return {key: cast_tensor(value, traced.precision).to(device) for key, value in batch.items()}


@contextmanager
def _failures(name: str, micro_batch_size: int, device: torch.device) -> Iterator[None]:
    """Words for a layer that does not run."""
    where = f"layer {name!r} on {device.type} with micro-batches of {micro_batch_size}"
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(where, error) from None
    except ModelFileError:
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch's allocator of a CPU has no class of its own
            raise _too_large(where, error) from None
        raise RunError(
            f"{where}: {type(error).__name__}: {error}{raised_at(error)}",
            hint="run the model itself on this device first",
        ) from None


def _too_large(where: str, error: BaseException) -> RunError:
    return RunError(
        f"{where} does not fit in memory: {error}", hint="measure a smaller micro-batch"
    )
