"""Plain gradient accumulation with the user's own eager module: what every plan must reproduce.

It shares with the executor only the keys of the random operators.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from planner.model_file import ModelFile, forward_keys
from runtime.random import KeyedRandom

__all__ = ["accumulate", "loss_of_model"]

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
    share = [1 / len(micro_batches)] * len(micro_batches)
    if weight_of is not None:
        weights = [float(weight_of(samples)) for _, _, samples in micro_batches]
        share = [weight / sum(weights) for weight in weights]
    model.zero_grad(set_to_none=True)
    for (replica, micro_batch, samples), part in zip(micro_batches, share, strict=True):
        random.begin(step=step, replica=replica, micro_batch=micro_batch)
        with random:
            loss = loss_of(samples)
            (loss * part).backward()
        losses.append(loss.detach())
    return losses


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
