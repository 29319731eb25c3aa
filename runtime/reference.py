"""Plain gradient accumulation with the user's own eager module: what every plan must reproduce.

It shares with the executor only the keys of the random operators.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from planner.model_file import ModelFile, forward_keys
from runtime.random import KeyedRandom

__all__ = ["accumulate", "accumulate_mixed", "loss_of_model"]

LossOf = Callable[[Mapping[str, Tensor]], Tensor]
WeightOf = Callable[[Mapping[str, Tensor]], Tensor | float]


def accumulate(
    model: torch.nn.Module,
    loss_of: LossOf,
    micro_batches: Sequence[tuple[int, int, Mapping[str, Tensor]]],
    *,
    seed: int,
    step: int,
    weight_of: WeightOf | None = None,
) -> list[Tensor]:
    """Add up the gradients of all micro-batches in each parameter's `.grad`; return the losses.

    Args:
        model: in training mode.
        loss_of: micro-batch -> loss.
        micro_batches: (replica, micro-batch, its samples) of all replicas, in order.
        seed: of the random keys.
        step: of the random keys.
        weight_of: micro-batch -> its weight in the step's loss; all weigh the same by default.
    """
    random, losses = KeyedRandom(seed), []
    share = _shares(micro_batches, weight_of)
    model.zero_grad(set_to_none=True)
    for (replica, micro_batch, samples), part in zip(micro_batches, share, strict=True):
        random.begin(step=step, replica=replica, micro_batch=micro_batch)
        with random:
            loss = loss_of(samples)
            (loss * part).backward()
        losses.append(loss.detach())
    return losses


def accumulate_mixed(
    model: torch.nn.Module,
    loss_of: LossOf,
    micro_batches: Sequence[tuple[int, int, Mapping[str, Tensor]]],
    *,
    seed: int,
    step: int,
    loss_scale: float = 1.0,
    weight_of: WeightOf | None = None,
) -> list[Tensor]:
    """The same for a model that computes in half precision: gradients are added up in float32.

    The gradient of each micro-batch is of the parameter's own type; the sum, in `.grad`, is of
    float32, and divided by `loss_scale` (a power of two), which the losses are multiplied by.
    """
    random, losses = KeyedRandom(seed), []
    model.zero_grad(set_to_none=True)
    sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()}
    trained, share = set(), _shares(micro_batches, weight_of)
    for (replica, micro_batch, samples), part in zip(micro_batches, share, strict=True):
        random.begin(step=step, replica=replica, micro_batch=micro_batch)
        with random:
            loss = loss_of(samples)
            (loss * loss_scale * part).backward()
        losses.append(loss.detach())
        for parameter, total in sums.items():
            if parameter.grad is not None:
                total += parameter.grad.float()
                parameter.grad = None
                trained.add(parameter)
    for parameter in trained:
        parameter.grad_dtype = None  # as the sum is not of the parameter's type
        parameter.grad = sums[parameter] / loss_scale
    return losses


def _shares(
    micro_batches: Sequence[tuple[int, int, Mapping[str, Tensor]]], weight_of: WeightOf | None
) -> list[float]:
    """What each micro-batch's loss counts of the step's."""
    if weight_of is None:
        return [1 / len(micro_batches)] * len(micro_batches)
    weights = [float(weight_of(samples)) for _, _, samples in micro_batches]
    return [weight / sum(weights) for weight in weights]


def loss_of_model(model: torch.nn.Module, model_file: ModelFile) -> LossOf:
    """The loss of one micro-batch, as the model-file contract defines it."""

    def loss_of(samples: Mapping[str, Tensor]) -> Tensor:
        output = _output(model, model_file, samples)
        if model_file.loss_fn is not None:
            return model_file.loss_fn(output, samples)
        if isinstance(output, Tensor):
            return output
        loss: Tensor = output["loss"] if hasattr(output, "keys") else output[0]
        return loss

    return loss_of


def _output(model: torch.nn.Module, model_file: ModelFile, samples: Mapping[str, Tensor]) -> Any:
    if not model_file.layers:
        return model(**{key: samples[key] for key in forward_keys(model, samples)})
    first, *others = (model.get_submodule(path) for path in model_file.layers)
    value = first(**{key: samples[key] for key in forward_keys(first, samples)})
    for layer in others:
        value = layer(value)
    return value
