"""What an optimizer keeps of every parameter, in bytes, by a step of it on fake tensors.

The user's own `build_optimizer` makes it, for one parameter of each shape and type: nothing of a
model's size is allocated. This module knows optimizers as their state shows them. It does not know
plans.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import ModelFileError
from planner.graph import ParameterSpec
from planner.model_file import ModelFile, raised_at
from planner.precision import Precision

__all__ = ["OptimizerState", "measure_optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """What an optimizer keeps between two steps."""

    name: str
    """Its class."""
    num_bytes: Mapping[str, int]
    """Trainable parameter -> bytes, step counters and other scalars included."""
    num_slots: int
    """Tensors of a parameter's shape that it keeps for each parameter, at most."""
    is_elementwise: bool
    """Whether all that it keeps is of the parameter's shape, or a scalar. What is not (factored
    moments) depends on the whole parameter: parts of it cannot be updated apart."""


class _Scalars(TorchDispatchMode):
    """Numbers read from fake tensors are made up: an optimizer's sizes do not depend on its values.

    Integers are 1, others a half: what they lack to 1, which NAdam divides by, is not 0 either.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _State:
    name: str
    tensors: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def measure_optimizer(
    model_file: ModelFile,
    parameters: Iterable[ParameterSpec],
    precision: Precision = Precision.MODEL,
) -> OptimizerState:
    """Bytes of optimizer state of every trainable parameter; AdamW where the user builds none.

    `parameters` are those of a graph traced in `precision`; the optimizer is given the masters.

    Raises:
        ModelFileError: `build_optimizer` fails, or returns no optimizer, or its step fails.
    """
    trained = [parameter for parameter in parameters if parameter.trainable]
    kinds = {p.name: (p.shape, precision.master_dtype(p.dtype)) for p in trained}
    states = {kind: _step(model_file, *kind) for kind in dict.fromkeys(kinds.values())}
    tensors = [(shape, t) for (shape, _), state in states.items() for t in state.tensors]
    slots = (
        sum(tensor.shape == shape and tensor.numel() > 1 for tensor in state.tensors)
        for (shape, _), state in states.items()
    )
    return OptimizerState(
        name=next((state.name for state in states.values()), ""),
        num_bytes={name: states[kind].num_bytes for name, kind in kinds.items()},
        num_slots=max(slots, default=0),
        is_elementwise=all(t.numel() == 1 or t.shape == shape for shape, t in tensors),
    )


def _step(model_file: ModelFile, shape: tuple[int, ...], dtype: str) -> _State:
    build = model_file.build_optimizer or torch.optim.AdamW
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Scalars():  # type: ignore[no-untyped-call]
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=getattr(torch, dtype)))
            parameter.grad = torch.empty_like(parameter)
            optimizer = build([parameter])
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"it returned {type(optimizer).__name__}, not an Optimizer")
            optimizer.step()
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"build_optimizer of {model_file.name} failed on one parameter of "
            f"{' x '.join(map(str, shape)) or 'no dimension'}: {type(error).__name__}: {error}"
            f"{raised_at(error)}",
            hint="it takes a list of parameters and returns a torch.optim.Optimizer, whose step() "
            "needs no closure",
        ) from None
    found = optimizer.state[parameter].values()
    tensors = tuple(value for value in found if isinstance(value, torch.Tensor))
    return _State(type(optimizer).__name__, tensors)
