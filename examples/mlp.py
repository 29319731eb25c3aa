"""The plainest model that has enough layers for a pipeline: an nn.Sequential of residual blocks.

The model is itself an nn.Sequential, whose forward names its argument `input`; that is therefore
the key of the batch. It learns a fixed smooth function of random points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

NUM_INPUTS = 32
NUM_OUTPUTS = 8
WIDTH = 128
NUM_BLOCKS = 12
NUM_POINTS = 4096


class ResidualBlock(nn.Module):
    """Normalise, widen twofold, narrow again, add to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.narrow(F.gelu(self.widen(self.norm(hidden))))
        return output


class SmoothFunction(Dataset[dict[str, Tensor]]):
    """Point i is drawn from i alone; its targets are sines of fixed mixtures of its coordinates."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mixture = torch.randn(NUM_INPUTS, NUM_OUTPUTS, generator=generator) / NUM_INPUTS**0.5

    def __len__(self) -> int:
        return NUM_POINTS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < NUM_POINTS:
            raise IndexError(f"point {index} of {NUM_POINTS}")
        point = torch.randn(NUM_INPUTS, generator=torch.Generator().manual_seed(index + 1))
        return {"input": point, "targets": torch.sin(point @ self.mixture)}


def build_model() -> nn.Module:
    """The model, with fresh weights on the current default device."""
    blocks = [ResidualBlock() for _ in range(NUM_BLOCKS)]
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NUM_OUTPUTS)
    )


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random points and targets in the form of a batch."""
    return {
        "input": torch.randn(batch_size, NUM_INPUTS),
        "targets": torch.randn(batch_size, NUM_OUTPUTS),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared distance to the target, per coordinate."""
    return F.mse_loss(output, batch["targets"])


def build_dataset() -> Dataset[dict[str, Tensor]]:
    """NUM_POINTS points, the same on every machine."""
    return SmoothFunction()
