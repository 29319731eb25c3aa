"""Time an optimizer's step over one layer's parameters, and count what it keeps of them.

It knows optimizers as they run. It does not know models or plans.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from planner.errors import ModelFileError
from planner.measure.clock import Clock, Seconds, seconds_of
from planner.model_file import ModelFile, raised_at
from planner.storages import tensors_in

__all__ = ["BuildOptimizer", "Update", "measure_update", "optimizer_name"]

BuildOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """An optimizer's step, and its state between two steps."""

    seconds: Seconds
    state_bytes: int
    """Of every tensor that it keeps of the parameters, step counters included."""


def optimizer_name(model_file: ModelFile) -> str:
    """Class of the optimizer whose update is timed."""
    if model_file.build_optimizer is None:
        return torch.optim.AdamW.__name__
    return type(_built(model_file.build_optimizer, [nn.Parameter(torch.zeros(2, 2))])).__name__


def measure_update(
    parameters: list[nn.Parameter],
    build: BuildOptimizer | None,
    device: torch.device,
    *,
    num_warm_ups: int,
    num_repeats: int,
) -> Update:
    """Steps of the optimizer (AdamW where the user builds none); gradients are let go in each.

    `parameters` have gradients, and take new values.

    Raises:
        ModelFileError: `build` fails.
    """
    if not parameters:
        return Update(seconds=Seconds(median=0.0, spread=0.0), state_bytes=0)
    clock, samples = Clock(device), []
    gradients = [parameter.grad for parameter in parameters]
    optimizer = _built(build or torch.optim.AdamW, parameters)
    for repeat in range(num_warm_ups + num_repeats):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        first = clock.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        second = clock.mark()
        clock.wait()
        if repeat >= num_warm_ups:
            samples.append(clock.seconds_between(first, second))
    kept = {id(t): t.nbytes for p in parameters for t in tensors_in(dict(optimizer.state[p]))}
    return Update(seconds=seconds_of(samples), state_bytes=sum(kept.values()))


def _built(build: BuildOptimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        return build(parameters)
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"build_optimizer raised {type(error).__name__} for the parameters of one layer: "
            f"{error}{raised_at(error)}",
            hint="it takes any list of the model's parameters",
        ) from None
