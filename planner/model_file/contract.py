"""What a model file must define, and how each function is called."""

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from planner.errors import ModelFileError

__all__ = ["ModelFile", "check_contract", "model_from_functions"]

_OPTIONAL = ("loss_fn", "loss_weight", "build_optimizer", "build_scheduler", "build_dataset")
_SIGNATURES = {
    "build_model": "build_model() -> torch.nn.Module",
    "example_batch": "example_batch(batch_size) -> dict[str, torch.Tensor]",
    "loss_fn": "loss_fn(output, batch) -> torch.Tensor",
    "loss_weight": "loss_weight(batch) -> torch.Tensor",
    "build_optimizer": "build_optimizer(parameters) -> torch.optim.Optimizer",
    "build_scheduler": "build_scheduler(optimizer)",
    "build_dataset": "build_dataset() -> torch.utils.data.Dataset",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """What a model file defines."""

    name: str
    """File name without its suffix, or the module's last name."""
    path: str
    """As the user gave it."""
    build_model: Callable[[], nn.Module]
    example_batch: Callable[[int], dict[str, torch.Tensor]]
    loss_fn: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    """None where the model returns its loss."""
    loss_weight: Callable[[Mapping[str, torch.Tensor]], torch.Tensor | float] | None = None
    """How much a micro-batch counts in the step's loss: its tokens, say. None: all count alike."""
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    build_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    build_dataset: Callable[[], Any] | None = None
    layers: tuple[str, ...] = ()
    """Paths of the modules that are called in sequence, where the user lists them: the first
    takes the batch, each next one the previous output. Empty where the model is traced."""
    keep_float32: tuple[str, ...] = ()
    """Patterns of parameters and buffers whose modules compute in float32 in mixed precision."""


def model_from_functions(
    build_model: Callable[[], nn.Module] | nn.Module,
    example_batch: Callable[[int], dict[str, torch.Tensor]],
    *,
    loss_fn: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
    loss_weight: Callable[[Mapping[str, torch.Tensor]], torch.Tensor | float] | None = None,
    name: str = "",
    layers: tuple[str, ...] = (),
    keep_float32: tuple[str, ...] = (),
) -> ModelFile:
    """A ModelFile from Python objects; a model that is already built is never changed."""
    built = build_model
    builder = (lambda: built) if isinstance(built, nn.Module) else built
    default = type(built).__name__ if isinstance(built, nn.Module) else built.__name__
    return ModelFile(
        name=name or default,
        path="",
        build_model=builder,
        example_batch=example_batch,
        loss_fn=loss_fn,
        loss_weight=loss_weight,
        layers=layers,
        keep_float32=keep_float32,
    )


def check_contract(module: ModuleType, name: str, path: str) -> ModelFile:
    """The ModelFile that a loaded module defines.

    Raises:
        ModelFileError: a function is missing, or is not called as the contract says.
    """
    layers = getattr(module, "layers", None)
    listed = _check_layers(layers, path)
    found: dict[str, Any] = {}
    if listed and isinstance(layers[0], nn.Module):  # type: ignore[index]
        modules = list(layers)  # type: ignore[arg-type]
        # A copy for every build: the file's own modules keep their weights.
        found["build_model"] = lambda: nn.Sequential(*copy.deepcopy(modules))
    for word in ("build_model", "example_batch", *_OPTIONAL):
        if word in found:
            continue
        value = getattr(module, word, None)
        if value is None and word in _OPTIONAL:
            continue
        if value is None:
            close = difflib.get_close_matches(word, dir(module), n=1)
            hint = f"did you mean {close[0]}?" if close else f"add `def {_SIGNATURES[word]}`"
            raise ModelFileError(f"{path} does not define {word}", hint=hint)
        _check_callable(value, word, path)
        found[word] = value
    kept = _check_patterns(getattr(module, "keep_float32", ()), path)
    return ModelFile(name=name, path=path, layers=listed, keep_float32=kept, **found)


def _check_patterns(patterns: Any, path: str) -> tuple[str, ...]:
    if isinstance(patterns, (list, tuple)) and all(isinstance(one, str) for one in patterns):
        return tuple(patterns)
    raise ModelFileError(
        f"{path}: keep_float32 is {patterns!r:.80}",
        hint="make it a list of patterns of parameters' names, such as ['*.norm.*']",
    )


def _check_layers(layers: Any, path: str) -> tuple[str, ...]:
    if layers is None:
        return ()
    if isinstance(layers, (list, tuple, nn.ModuleList, nn.Sequential)) and len(layers):
        if all(isinstance(layer, str) for layer in layers):
            return tuple(layers)
        if all(isinstance(layer, nn.Module) for layer in layers):
            return tuple(str(index) for index in range(len(layers)))
    raise ModelFileError(
        f"{path}: layers is {layers!r:.80}",
        hint="make it a list of nn.Modules, or a list of module paths (strings) in the model",
    )


def _check_callable(value: Any, word: str, path: str) -> None:
    """Refuse what cannot be called as `_SIGNATURES` says."""
    hint = f"make it a function: `def {_SIGNATURES[word]}`"
    if not callable(value) or (isinstance(value, nn.Module) and word != "loss_fn"):
        raise ModelFileError(f"{path}: {word} is {value!r:.60}, not a function", hint=hint)
    words = _SIGNATURES[word].partition("(")[2].partition(")")[0]
    arguments = [argument for argument in words.split(", ") if argument]
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # not every callable written in C has one
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = _SIGNATURES[word].partition(" ->")[0]
        raise ModelFileError(
            f"{path}: {word}{signature} cannot be called as {called}: {error}",
            hint=f"make it `def {_SIGNATURES[word]}`",
        ) from None
