"""The user's model file: loads it, checks its contract, and identifies the model it builds.

A model file defines `build_model` and `example_batch`, and may define `loss_fn`,
`build_optimizer`, `build_scheduler`, `build_dataset` and `layers`. This module knows names and
signatures. It does not know how a model is traced, planned or run.
"""

import ast
import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from planner.errors import ModelFileError

__all__ = ["ModelFile", "fingerprint", "forward_keys", "load_model_file", "model_from_functions"]

_OPTIONAL = ("loss_fn", "build_optimizer", "build_scheduler", "build_dataset")


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
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    build_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    build_dataset: Callable[[], Any] | None = None
    layers: tuple[str, ...] = ()
    """Paths of the modules that are called in sequence, where the user lists them: the first
    takes the batch, each next one the previous output. Empty where the model is traced."""


def load_model_file(path_or_module: str) -> ModelFile:
    """Load `model.py` (a path) or `package.module` (an importable name).

    Raises:
        ModelFileError: no such file or module, it does not run, or it breaks the contract.
    """
    if path_or_module.endswith(".py") or "/" in path_or_module:
        module, name = _load_path(path_or_module), Path(path_or_module).stem
    else:
        module, name = _load_module(path_or_module), path_or_module.rpartition(".")[2]
    return _check(module, name, path_or_module)


def model_from_functions(
    build_model: Callable[[], nn.Module] | nn.Module,
    example_batch: Callable[[int], dict[str, torch.Tensor]],
    *,
    loss_fn: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
    name: str = "",
    layers: tuple[str, ...] = (),
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
        layers=layers,
    )


def _load_path(text: str) -> ModuleType:
    path = Path(text)
    if not path.is_file():
        folder = path.parent
        names = [file.name for file in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        hint = f"did you mean {folder / close[0]}?" if close else "give the path of a .py file"
        raise ModelFileError(f"there is no model file {text!r}", hint=hint)
    unique = f"lga_model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    folder_name = str(path.resolve().parent)
    added = folder_name not in sys.path
    if added:
        sys.path.insert(0, folder_name)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[unique]
        raise _import_error(text, error) from None
    finally:
        if added and folder_name in sys.path:
            sys.path.remove(folder_name)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _import_error(name, error) from None
        raise ModelFileError(
            f"there is no module {name!r}",
            hint="give a path ending in .py, or a module that Python can import from here",
        ) from None
    except BaseException as error:
        raise _import_error(name, error) from None


def _import_error(name: str, error: BaseException) -> BaseException:
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}"
        message = f"{name} is not valid Python: {error.msg}\n  {where}"
        return ModelFileError(message, hint="correct the line")
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "importlib" not in frame.filename]
    where = f"\n  {inside[-1].filename}, line {inside[-1].lineno}: {inside[-1].line}"
    where = where if inside[1:] else ""
    return ModelFileError(
        f"{name} raised {type(error).__name__}: {error}{where}",
        hint="make the file run with plain Python first",
    )


def _check(module: ModuleType, name: str, path: str) -> ModelFile:
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
            hint = f"did you mean {close[0]}?" if close else f"add `def {_signature(word)}`"
            raise ModelFileError(f"{path} does not define {word}", hint=hint)
        if not callable(value):
            raise ModelFileError(
                f"{path}: {word} is {value!r:.60}, which cannot be called",
                hint=f"make it a function: `def {_signature(word)}`",
            )
        found[word] = value
    return ModelFile(name=name, path=path, layers=listed, **found)


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


def _signature(word: str) -> str:
    return {
        "build_model": "build_model() -> torch.nn.Module",
        "example_batch": "example_batch(batch_size) -> dict[str, torch.Tensor]",
        "loss_fn": "loss_fn(output, batch) -> torch.Tensor",
        "build_optimizer": "build_optimizer(parameters) -> torch.optim.Optimizer",
        "build_scheduler": "build_scheduler(optimizer)",
        "build_dataset": "build_dataset() -> torch.utils.data.Dataset",
    }[word]


def forward_keys(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the batch that are parameters of the model's `forward`, in the batch's order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind in kinds}
    return tuple(key for key in batch if key in names)


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's structure: 32 hexadecimal digits, equal on meta and on a device.

    Covers names, shapes, dtypes and `requires_grad` of parameters and buffers, ties, the classes
    of the module tree, and the forwards of classes that torch does not define (comments,
    formatting and docstrings aside). Values are not covered.
    """
    digest = hashlib.sha256()
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied = first_names.setdefault(id(parameter), name)
        line = f"P {name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}"
        digest.update(f"{line} {tied}\n".encode())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        digest.update(f"B {name} {tuple(buffer.shape)} {buffer.dtype}\n".encode())
    classes: dict[str, type[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"M {name} {type(module).__qualname__}\n".encode())
        if not type(module).__module__.startswith("torch."):
            classes.setdefault(type(module).__qualname__, type(module))
    for name in sorted(classes):
        digest.update(f"F {name} {_forward_source(classes[name])}\n".encode())
    return digest.hexdigest()[:32]


def _forward_source(module_class: type[nn.Module]) -> str:
    try:
        forward = inspect.unwrap(module_class.forward)
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
