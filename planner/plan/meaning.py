"""What each function of the statement language computes, on fake tensors and on real ones.

The planner runs statements one by one to analyse them; the runtime resolves them once and runs them
many times. Both ask here, so that a plan means what was analysed.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planner.plan.code import Reference, Statement, Symbol

__all__ = ["Bindings", "fill", "function_of", "template_of"]


class Bindings(Protocol):
    """What statements refer to beside each other."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def batch(self) -> Mapping[str, Tensor]:
        """Of the micro-batch at hand."""

    @property
    def loss_fn(self) -> Callable[[Any, Mapping[str, Tensor]], Tensor] | None: ...


def function_of(statement: Statement, bindings: Bindings) -> Callable[..., Any]:
    """The function that a statement calls; `bindings.batch` is read at every call.

    Raises:
        AttributeError: the model has no such module, or torch no such operator.
    """
    model = bindings.model
    match statement.function:
        case "layer":
            return model.get_submodule(statement.path)
        case "batch":
            return lambda key: bindings.batch[key]
        case "parameter":
            return model.get_parameter
        case "buffer":
            return model.get_buffer
        case "tensor":
            return lambda data, dtype: torch.tensor(data, dtype=dtype, device=bindings.device)
        case "getitem":
            return operator.getitem
        case "getattr":
            return getattr
        case "unflatten":
            return _unflatten
        case "loss":
            loss_fn = bindings.loss_fn
            assert loss_fn is not None, "the plan computes a loss with the model file's loss_fn"
            return lambda output: loss_fn(output, bindings.batch)
    _, name, overload = statement.function.split(".")
    resolved: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), overload)
    return resolved


def template_of(value: Any, device: torch.device) -> Any:
    """An argument with torch objects in place of symbols; references stay."""
    match value:
        case Symbol(text="device"):
            return device
        case Symbol(text=text):
            return getattr(torch, text.removeprefix("torch."))
        case list():
            return [template_of(item, device) for item in value]
        case tuple():
            return tuple(template_of(item, device) for item in value)
        case dict():
            return {key: template_of(item, device) for key, item in value.items()}
        case slice():
            parts = (value.start, value.stop, value.step)
            return slice(*(template_of(part, device) for part in parts))
    return value


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with values in place of references."""
    kind = type(template)
    if kind is Reference:
        return values[template.name]
    if kind is list:
        return [fill(item, values) for item in template]
    if kind is tuple:
        return tuple([fill(item, values) for item in template])
    if kind is dict:
        return {key: fill(item, values) for key, item in template.items()}
    if kind is slice:
        return slice(*[fill(x, values) for x in (template.start, template.stop, template.step)])
    return template


def _unflatten(specification: str, leaves: list[Any]) -> Any:
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(specification))
