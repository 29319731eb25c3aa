"""What an optimizer keeps, and what it makes while it updates: tensors as large as parameters.

Counted on one, two and three small parameters. What it makes for each parameter in turn may outlive
that parameter's turn, as Python's variables do, but not the next one's; what it makes for all at
once grows with their number. It knows optimizers. It does not know models or plans.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import ModelFileError
from planner.model_file import ModelFile, raised_at
from planner.storages import LiveStorages, StorageWatcher

__all__ = ["OptimizerSlots", "optimizer_slots"]

_WIDTH = 32
"""Of the parameters: small numbers that an optimizer keeps or makes do not show beside them."""
_Build = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSlots:
    """Numbers of tensors as large as parameters."""

    kept: int
    """Between updates, for each parameter (AdamW: 2)."""
    of_each: float
    """In an update, while one parameter has its turn: each as large as that parameter."""
    of_previous: float
    """As large as the parameter that had its turn before."""
    of_all: float
    """As large as all parameters together."""


def optimizer_slots(model_file: ModelFile, *, is_cuda: bool) -> OptimizerSlots:
    """Counted with the model file's optimizer, or AdamW where it has none.

    With `is_cuda`, as torch's optimizers do it there: with one kernel for all parameters
    (`foreach`), unless their settings say otherwise.

    Raises:
        ModelFileError: build_optimizer fails, or its optimizer cannot step.
    """
    build: _Build = model_file.build_optimizer or torch.optim.AdamW
    try:
        kept, one = _update(build, 1, is_cuda=is_cuda)
        _, two = _update(build, 2, is_cuda=is_cuda)
        _, three = _update(build, 3, is_cuda=is_cuda)
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"build_optimizer of {model_file.name} failed on parameters of {_WIDTH} x {_WIDTH}: "
            f"{type(error).__name__}: {error}{raised_at(error)}",
            hint="it takes a list of parameters and returns a torch.optim.Optimizer, whose step() "
            "needs no closure",
        ) from None
    of_all = max(0.0, three - two)
    return OptimizerSlots(
        kept=kept,
        of_each=max(0.0, one - of_all),
        of_previous=max(0.0, two - one - of_all),
        of_all=of_all,
    )


def _update(build: _Build, num_parameters: int, *, is_cuda: bool) -> tuple[int, float]:
    """Tensors kept per parameter, and made by a second update, which has its state already."""
    parameters = [torch.nn.Parameter(torch.zeros(_WIDTH, _WIDTH)) for _ in range(num_parameters)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"it returned {type(optimizer).__name__}, not an Optimizer")
    for group in optimizer.param_groups:
        if is_cuda and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    optimizer.step()
    size = parameters[0].numel()
    state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    kept = sum(value.numel() == size for value in state) // num_parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    storages = LiveStorages([*parameters, *gradients, *state])
    with StorageWatcher(storages):
        optimizer.step()
    return kept, round(storages.peak_bytes / parameters[0].nbytes, 1)
