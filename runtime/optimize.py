"""The optimizer of each unit, built by the user's function and stepped on this rank's part.

Each unit has an optimizer of its own, so that it can be updated as soon as its gradient is reduced.
With a partitioned state the optimizer sees one-dimensional pieces of parameters; the groups the
user's function makes (no decay on norms, ...) are kept, because it is called with whole parameters
first. Only optimizers that treat every element alike give the same result on pieces.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from planner.errors import UsageError
from runtime.shards import UnitState

__all__ = ["ELEMENTWISE_OPTIMIZERS", "UnitOptimizer", "default_optimizer"]

ELEMENTWISE_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
)  # fmt: skip

BuildOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
BuildScheduler = Callable[[torch.optim.Optimizer], LRScheduler]
Moments = dict[str, dict[str, Any]]
"""The optimizer's state by parameter and its own names: tensors and numbers."""


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with torch's own settings: what a model file without build_optimizer gets."""
    return torch.optim.AdamW(parameters)


class UnitOptimizer:
    """Updates one unit."""

    def __init__(
        self,
        state: UnitState,
        build_optimizer: BuildOptimizer,
        build_scheduler: BuildScheduler | None,
    ) -> None:
        """
        Raises:
            UsageError: the state is partitioned and the optimizer needs whole parameters, or
                its step needs a closure.
        """
        whole = [state.parameters[name] for name in state.parameters if name in state.trainable]
        optimizer = build_optimizer(whole)
        _check(optimizer, partitioned=state.partitioned)
        self._pieces = {piece.name: piece.parameter for piece in state.pieces}
        if state.has_own_pieces:
            names = {id(state.parameters[name]): name for name in state.parameters}
            for group in optimizer.param_groups:
                kept = [names[id(p)] for p in group["params"]]
                group["params"] = [self._pieces[name] for name in kept if name in self._pieces]
        self.optimizer = optimizer
        self.scheduler = build_scheduler(optimizer) if build_scheduler else None

    def step(self) -> None:
        """One update with the gradients attached to the pieces."""
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def release_gradients(self) -> None:
        """The pieces let go of their gradients."""
        for parameter in self._pieces.values():
            parameter.grad = None

    @property
    def pieces(self) -> dict[str, torch.nn.Parameter]:
        """What the optimizer updates, by the name of the parameter that it is a part of."""
        return self._pieces

    @property
    def moments(self) -> Moments:
        """What the optimizer keeps; the tensors are its own."""
        state = self.optimizer.state
        return {name: dict(state[p]) for name, p in self._pieces.items() if p in state}

    def put_moments(self, moments: Moments) -> None:
        """Instead of what the optimizer kept so far."""
        self.optimizer.state.clear()
        for name, values in moments.items():
            self.optimizer.state[self._pieces[name]] = dict(values)

    def tensors(self) -> list[torch.Tensor]:
        """Tensors the optimizer keeps."""
        states: Iterable[dict[str, Any]] = self.optimizer.state.values()
        return [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]


def _check(optimizer: torch.optim.Optimizer, *, partitioned: bool) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            "build_optimizer returned LBFGS, whose step evaluates the model several times",
            hint="use an optimizer that steps once per gradient, such as AdamW",
        )
    if partitioned and not (
        type(optimizer).__module__.startswith("torch.optim") and name in ELEMENTWISE_OPTIMIZERS
    ):
        raise UsageError(
            f"the plan partitions the optimizer state, but {name} may need whole parameters",
            hint=f"plan with --partition 0, or use one of {', '.join(ELEMENTWISE_OPTIMIZERS)}",
        )
