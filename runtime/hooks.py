"""What a training loop may watch: steps, and the gradient of every parameter before its update.

This module knows functions of the user's and parts of gradients. It does not know what runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from runtime.shards import UnitState
from runtime.transport import Transport

__all__ = ["GradientPart", "Gradients", "Hooks", "not_finite", "parts_of_gradient"]

Remove = Callable[[], None]
"""Takes a hook away again."""
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPart:
    """What this rank holds of one parameter's whole gradient, over the step's whole batch."""

    name: str
    shape: tuple[int, ...]
    """The parameter's."""
    first: int
    """Place of the first element in the parameter's memory order."""
    values: Tensor
    """In the parameter's shape where all of it is here; else a vector, the replica's part. Not
    clipped yet. A hook may change it in place."""


class Hooks(Generic[Function]):
    """Functions to be called, in the order in which they were added."""

    def __init__(self) -> None:
        self.functions: list[Function] = []

    def add(self, function: Function) -> Remove:
        """Returns what takes it away again."""
        self.functions.append(function)
        return lambda: self.functions.remove(function)


def parts_of_gradient(state: UnitState, gradient: Tensor) -> list[GradientPart]:
    """Of a unit's gradient as the update has it, by parameter."""
    found = []
    for piece in state.pieces:
        name, values = piece.name, gradient[piece.first - state.first : piece.last - state.first]
        if not state.partitioned:
            values = values.as_strided(state.shapes[name], state.strides[name])
        first = piece.first - state.ranges[name][0]
        found.append(GradientPart(name=name, shape=state.shapes[name], first=first, values=values))
    return found


def not_finite(state: UnitState, gradient: Tensor) -> list[str]:
    """Parameters of a unit whose gradient, or this rank's part of it, is not finite."""
    parts = parts_of_gradient(state, gradient)
    return [part.name for part in parts if not bool(part.values.isfinite().all())]


class Gradients:
    """The gradients of one step, kept: this rank's parts, or whole ones on request."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._units: list[tuple[UnitState, Tensor]] = []

    def keep(self, state: UnitState, gradient: Tensor) -> None:
        self._units.append((state, gradient.clone()))

    @property
    def parts(self) -> dict[str, GradientPart]:
        """By parameter: what this rank updates."""
        found = (part for unit in self._units for part in parts_of_gradient(*unit))
        return {part.name: part for part in found}

    def whole(self) -> dict[str, Tensor]:
        """By parameter of this rank's stages; where the state is partitioned, a collective."""
        found: dict[str, Tensor] = {}
        for state, gradient in self._units:
            flat = gradient
            if state.partitioned:
                flat = gradient.new_empty(state.padded_length, device=state.device)
                part = gradient.to(flat.device)
                self._transport.gather(part, flat, f"gradient of {state.unit.name}").wait()
            views = state.views(flat)
            found |= {name: view.clone() for name, view in views if name in state.trainable}
        return found
