"""A U-Net with 0.44 billion parameters in bfloat16, for planning only: no weights are ever made."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

IMAGE_SIZE, NUM_CHANNELS = 256, 3
WIDTHS = (128, 256, 512, 1024, 2048)
"""Channels of each level; every level but the first works at half the resolution of the last."""
NUM_BLOCKS_PER_LEVEL = 4


class Block(nn.Module):
    """A 3 x 3 convolution, group normalisation and SiLU, added to its input where shapes agree."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
        self.norm = nn.GroupNorm(32, num_outputs)
        self.is_residual = num_inputs == num_outputs

    def forward(self, hidden: Tensor) -> Tensor:
        output = F.silu(self.norm(self.convolution(hidden)))
        return hidden + output if self.is_residual else output


class UNet(nn.Module):
    """An encoder, and a decoder that reads every level of the encoder again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(NUM_CHANNELS, WIDTHS[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = WIDTHS[0]
        for level_width in WIDTHS:
            self.down.extend(_level(width, level_width))
            width = level_width
        for level_width in reversed(WIDTHS):
            self.up.extend(_level(width + level_width, level_width))
            width = level_width
        self.head = nn.Conv2d(width, NUM_CHANNELS, 1)

    def forward(self, noisy: Tensor) -> Tensor:
        hidden = self.stem(noisy)
        skips = []
        for index, block in enumerate(self.down, start=1):
            hidden = block(hidden)
            if index % NUM_BLOCKS_PER_LEVEL == 0:
                skips.append(hidden)
                hidden = F.max_pool2d(hidden, 2)
        for index, block in enumerate(self.up):
            if index % NUM_BLOCKS_PER_LEVEL == 0:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = block(hidden)
        noise: Tensor = self.head(hidden)
        return noise


def _level(num_inputs: int, num_outputs: int) -> list[Block]:
    widths = [num_inputs] + [num_outputs] * NUM_BLOCKS_PER_LEVEL
    return [Block(*pair) for pair in itertools.pairwise(widths)]


def build_model() -> nn.Module:
    """40 blocks with five skip connections."""
    return UNet().to(torch.bfloat16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random images."""
    shape = (batch_size, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    return {name: torch.randn(shape, dtype=torch.bfloat16) for name in ("noisy", "noise")}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared distance to the noise, per pixel."""
    return F.mse_loss(output, batch["noise"])
