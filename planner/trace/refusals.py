"""What a user's code does that no plan can hold, in words: values read, a loss that is none.

It does not know how a model is recorded or run.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from planner.errors import LgaError, ModelFileError, TraceError
from planner.model_file import raised_at
from planner.plan.code import Statement

__all__ = [
    "NO_VALUES",
    "PLAIN_VALUES",
    "check_loss",
    "check_output",
    "reads_values",
    "refuse_changing_buffer",
    "refuse_in_glue",
    "refuse_kept_state",
    "seeds_generator",
    "statement_error",
]

NO_VALUES = (
    "code that reads tensor values (.item(), `if tensor:`, boolean indexing) cannot be "
    "planned; use torch.where, or compute the value when the batch is made"
)
PLAIN_VALUES = "tensors, numbers, strings, and lists, tuples and dicts of them"


def statement_error(statement: Statement, error: BaseException) -> LgaError:
    """What an error of the user's code in this statement means."""
    reason = f"{type(error).__name__}: {error}{raised_at(error)}"
    if statement.function != "loss":
        hint = NO_VALUES if reads_values(error) else "give the model's layers plain tensors"
        return TraceError(f"running the traced model failed: {reason}", hint=hint)
    hint = NO_VALUES if reads_values(error) else "correct loss_fn(output, batch)"
    return ModelFileError(f"loss_fn raised {reason}", hint=hint)


def check_output(leaves: Sequence[Any], model: nn.Module) -> None:
    """Refuse an output without tensors, or with objects that a plan cannot hold among its leaves.

    Raises:
        TraceError: names the model's class and the object's.
    """
    plain = (torch.Tensor, bool, int, float, str, type(None))
    for leaf in leaves:
        if not isinstance(leaf, plain):
            raise TraceError(
                f"forward of {type(model).__name__} returns an object of type "
                f"{type(leaf).__name__}, which a plan cannot hold",
                hint=f"return {PLAIN_VALUES}",
            )
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        found = ", ".join(repr(leaf) for leaf in leaves[:3]) or "nothing"
        raise TraceError(
            f"forward of {type(model).__name__} returns {found:.60}, and no tensor",
            hint="return the tensors that loss_fn needs",
        )


def check_loss(loss: Any, model: nn.Module) -> None:
    """Refuse a loss that is not one number, or from which no gradient reaches a parameter.

    Raises:
        TraceError: names what the loss is, or what is not trained.
    """
    if not isinstance(loss, torch.Tensor) or loss.dim():
        is_tensor = isinstance(loss, torch.Tensor)
        what = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
        raise TraceError(
            f"the loss is {what}, not a tensor of one number (shape ())",
            hint="return the mean over the batch's samples, as loss.mean() gives it",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        number = sum(1 for _ in model.parameters())
        raise TraceError(
            f"there is nothing to train: none of the model's {number} parameters requires a "
            "gradient",
            hint="give the model parameters, or requires_grad_(True) to those it has",
        )
    if not loss.requires_grad:
        raise TraceError(
            "no trainable parameter has an effect on the loss",
            hint="check that loss_fn uses the model's output, and look for detach(), no_grad and "
            "integer types on the way",
        )


def reads_values(error: BaseException) -> bool:
    """Whether an error of fake tensors means that code asked for a tensor's values."""
    kinds = (DataDependentOutputException, DynamicOutputShapeException)
    return isinstance(error, kinds) or ".numpy() is not supported" in str(error)


@contextmanager
def refuse_in_glue(in_layer: Callable[[], bool]) -> Iterator[None]:
    """Refuse what changes gradients, or what is drawn, and leaves no trace between layers.

    Inside a layer it is the user's own business: layers run as they are. Autograd functions are
    watched by their `forward`, because `apply` may have been bound long before.
    """
    plain_hook: Callable[..., Any] = torch.Tensor.register_hook
    functions = [cls for cls in _subclasses(torch.autograd.Function) if "forward" in vars(cls)]
    plain_forwards = {cls: vars(cls)["forward"] for cls in functions}

    def watched(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not in_layer():
                raise _hidden(f"the autograd function {cls.__name__}")
            return forward(*args, **kwargs)

        return run

    def register_hook(self: torch.Tensor, hook: Callable[..., Any]) -> Any:
        if not in_layer():
            raise _hidden("register_hook on a tensor")
        return plain_hook(self, hook)

    for cls in functions:
        setattr(cls, "forward", staticmethod(watched(cls, cls.forward)))  # noqa: B010
    setattr(torch.Tensor, "register_hook", register_hook)  # noqa: B010
    try:
        with _refuse_seeding(in_layer):
            yield
    finally:
        for cls, forward in plain_forwards.items():
            setattr(cls, "forward", forward)  # noqa: B010
        setattr(torch.Tensor, "register_hook", plain_hook)  # noqa: B010


@contextmanager
def _refuse_seeding(in_layer: Callable[[], bool]) -> Iterator[None]:
    """Refuse to seed or restore torch's generator between layers: a plan has only operators there.

    Inside layers it is noticed by what it does to the generator (`seeds_generator`).
    """
    names = ("manual_seed", "seed", "set_rng_state")
    plain: dict[str, Callable[..., Any]] = {name: getattr(torch, name) for name in names}

    def watched(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not in_layer():
                raise seeds_generator("the model")
            return plain[name](*args, **kwargs)

        return run

    for name in names:
        setattr(torch, name, watched(name))
    try:
        yield
    finally:
        for name in names:
            setattr(torch, name, plain[name])


def seeds_generator(what: str) -> TraceError:
    """What a forward does that leaves torch's generator otherwise than drawing does."""
    return TraceError(
        f"{what} sets the state of torch's default generator (manual_seed, fork_rng) in its "
        "forward, so what later layers draw would depend on where the plan cuts",
        hint="leave it out: every random operator of a run has a key of its own, made of the "
        "run's seed, the step and the micro-batch; fixed numbers are a buffer",
    )


def refuse_kept_state(attributes: Iterable[str]) -> None:
    """Refuse a tensor that a forward changes and keeps in an attribute, outside layers.

    Raises:
        TraceError: names the attribute.
    """
    for name in attributes:
        raise TraceError(
            f"the model keeps {name!r}, a tensor that its forward makes and changes in place, "
            "between its layers, where the next forward would go on from it",
            hint="keep state in a layer, as a buffer; a table is kept as it is made, or made in "
            "one expression",
        )


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _hidden(what: str) -> TraceError:
    return TraceError(
        f"the model calls {what} between its layers, where a plan cannot keep its gradient",
        hint="put it into an nn.Module of its own: layers run as they are",
    )


def refuse_changing_buffer(name: str, buffer: torch.Tensor, layers: Collection[str]) -> None:
    """Refuse glue that reads what a layer may change: another rank would read an old value.

    Tables of integers (positions, token types) are not statistics, and stay as they are.

    Raises:
        TraceError: names the buffer and the layer that owns it.
    """
    owner = next((path for path in layers if name.startswith(f"{path}.")), None)
    if owner is not None and buffer.is_floating_point():
        raise TraceError(
            f"the model reads buffer {name!r} between its layers, but it belongs to layer "
            f"{owner!r}, which may change it",
            hint="read it inside that layer, or keep a buffer of the outer module",
        )
