"""What identifies a model, and which keys of a batch its forward takes."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["fingerprint", "forward_keys"]


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
