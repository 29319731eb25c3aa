"""Ways of tensors into an autograd graph and out of it, which keep nothing alive by themselves.

It knows tensors. It does not know layers, stages or plans.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Entry", "Exit", "enter"]


class Entry(torch.autograd.Function):
    """Lets an input into the graph, which then holds no leaf; its gradient goes to `sink[name]`.

    A leaf would keep the input alive for as long as the graph, and copy the gradient. `anchor` is
    any tensor that requires a gradient; it gets none. With `copy` the graph works on a copy, which
    it may change in place.
    """

    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, value: Tensor, sink: dict[str, Tensor], name: str, copy: bool
    ) -> Tensor:
        ctx.sink, ctx.input_name = sink, name
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.sink[ctx.input_name] = gradients[0]
        return None, None, None, None, None


class Exit(torch.autograd.Function):
    """Ends the graph in one root; backward hands out the gradients and holds them no longer.

    `gradients` are those of the outputs that follow, in order; backward empties it.
    """

    @staticmethod
    def forward(ctx: Any, gradients: dict[str, Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        found = tuple(ctx.gradients.values())
        ctx.gradients.clear()
        return None, *found


_apply: Any = super(torch.autograd.Function, Entry).apply


def enter(anchor: Tensor, value: Tensor, sink: dict[str, Tensor], name: str, copy: bool) -> Tensor:
    """`Entry.apply` without its look for torch.func transforms, which takes a third of its time."""
    entered: Tensor = _apply(anchor, value, sink, name, copy)
    return entered
