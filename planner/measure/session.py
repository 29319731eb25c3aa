"""A model and a device -> everything a profile file holds.

It knows the order of things. It does not know how a layer is run or a file is written.
"""

import datetime
from collections.abc import Sequence

import torch

from planner.measure.here import describe_device, versions_here
from planner.measure.measured import MeasuredModel, MeasuredSize
from planner.measure.timing import OnLayer, time_layers
from planner.measure.update import optimizer_name
from planner.model_file import ModelFile
from planner.precision import Precision
from planner.trace import TracedModel, patterns_of, trace

__all__ = ["measure_model", "measured_model"]


def measure_model(
    model_file: ModelFile,
    micro_batch_sizes: Sequence[int],
    device: torch.device,
    *,
    num_repeats: int,
    command: str = "",
    on_layer: OnLayer | None = None,
    precision: Precision = Precision.MODEL,
    keep_float32: Sequence[str] = (),
) -> MeasuredModel:
    """Measure every distinct layer at every one of the micro-batch sizes (in samples).

    In a mixed `precision`, as a plan in it computes; patterns are those of `planner.prepare`.

    Raises:
        UsageError: a pattern matches nothing, or there is nothing to keep it from.
        TraceError, ModelFileError: the model cannot be traced or built.
        RunError: a layer does not fit on the device, or does not run on it.
    """
    traced = trace(model_file, precision, patterns_of(model_file, precision, keep_float32))
    sizes = [
        time_layers(traced, size, device, num_repeats=num_repeats, on_layer=on_layer)
        for size in sorted(set(micro_batch_sizes))
    ]
    return measured_model(traced, sizes, device, num_repeats=num_repeats, command=command)


def measured_model(
    traced: TracedModel,
    sizes: Sequence[MeasuredSize],
    device: torch.device,
    *,
    num_repeats: int,
    command: str,
) -> MeasuredModel:
    """What was just measured here, with all that says where, when and how."""
    return MeasuredModel(
        model_name=traced.model_file.name,
        fingerprint=traced.fingerprint,
        device=describe_device(device),
        optimizer=optimizer_name(traced.model_file),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=versions_here(),
        command=command,
        num_repeats=num_repeats,
        sizes=tuple(sizes),
        precision=traced.precision,
        keep_float32=traced.keep_float32,
    )
