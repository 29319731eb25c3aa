"""Layers with torch.autograd.Functions of their own: one fused, one that lets gradients through."""

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class Fused(torch.autograd.Function):
    """x * sigmoid(gate), which saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * torch.sigmoid(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        open_ = torch.sigmoid(gate)
        return gradients[0] * open_, gradients[0] * x * open_ * (1 - open_)


class Round(torch.autograd.Function):
    """Forward and context apart, as newer functions are written."""

    @staticmethod
    def forward(value: Tensor, step: float) -> Tensor:
        return torch.round(value / step) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class Gated(nn.Module):
    """A gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + Fused.apply(self.value(x), self.gate(x))


class Quantised(nn.Linear):
    """Its weight is rounded in forward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return nn.functional.linear(input, Round.apply(self.weight, 0.05), self.bias)


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, WIDTH), Gated(), Quantised(WIDTH, WIDTH), Gated(), Quantised(WIDTH, 3)
    )


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"input": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
