"""Buffers that forward changes: running statistics, an average of one's own, a spectral norm."""

import torch
from torch import Tensor, nn

WIDTH = 8


class MovingAverage(nn.Module):
    """Subtracts an average of what it has seen, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * hidden.mean(0))
            self.num_calls += 1
        return (hidden - self.average) * self.scale


class Codebook(nn.Module):
    """Adds the nearest of its vectors, which move towards what chose them, by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("vectors", torch.randn(4, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = torch.cdist(hidden.detach(), self.vectors).argmin(1)
        nearest = self.vectors[chosen]
        with torch.no_grad():
            moved = self.vectors.index_add(0, chosen, 0.1 * (hidden - nearest))
            self.vectors = moved
        return self.mix(hidden) + nearest


class BuffersInForward(nn.Module):
    """Every kind, one after another."""

    def __init__(self) -> None:
        super().__init__()
        spectral = nn.utils.parametrizations.spectral_norm
        self.layers = nn.ModuleList(
            [
                nn.Linear(6, WIDTH),
                nn.BatchNorm1d(WIDTH),
                MovingAverage(),
                spectral(nn.Linear(WIDTH, WIDTH)),
                Codebook(),
                nn.BatchNorm1d(WIDTH, momentum=0.3, affine=False),
                nn.Linear(WIDTH, 3),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build_model() -> nn.Module:
    return BuffersInForward()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
