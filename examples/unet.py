"""A U-Net that removes noise from images: its skip connections span the whole depth.

Each level of the decoder reads what the encoder's same level made, so in a pipeline a tensor goes
from a stage to one that is not its neighbour, and its gradient comes back the same way. Pooling,
upsampling and concatenation stand between the blocks, not inside them. The images are made, not
read: soft waves of random direction, length and phase.
"""

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

IMAGE_SIZE = 32
NUM_CHANNELS = 1
WIDTHS = (16, 32, 64)
"""Channels of each level; every level but the first works at half the resolution of the last."""
NUM_BLOCKS_PER_LEVEL = 2
NUM_GROUPS = 4
NUM_IMAGES = 4096
LEARNING_RATE = 2e-3


class ConvolutionBlock(nn.Module):
    """A 3 x 3 convolution, group normalisation and SiLU, added to its input where shapes agree."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
        self.norm = nn.GroupNorm(NUM_GROUPS, num_outputs)
        self.is_residual = num_inputs == num_outputs

    def forward(self, hidden: Tensor) -> Tensor:
        output = F.silu(self.norm(self.convolution(hidden)))
        return hidden + output if self.is_residual else output


class UNet(nn.Module):
    """An encoder, a middle, and a decoder that reads every level of the encoder again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(NUM_CHANNELS, WIDTHS[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        width = WIDTHS[0]
        for level_width in WIDTHS:
            self.down.extend(_level(width, level_width))
            width = level_width
        self.middle = nn.ModuleList(_level(width, width))
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
        for block in self.middle:
            hidden = block(hidden)
        for index, block in enumerate(self.up):
            if index % NUM_BLOCKS_PER_LEVEL == 0:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = block(hidden)
        noise: Tensor = self.head(hidden)
        return noisy - noise


def _level(num_inputs: int, num_outputs: int) -> list[ConvolutionBlock]:
    widths = [num_inputs] + [num_outputs] * NUM_BLOCKS_PER_LEVEL
    return [ConvolutionBlock(*pair) for pair in itertools.pairwise(widths)]


class NoisyWaves(Dataset[dict[str, Tensor]]):
    """Image i: a wave drawn from i alone, and the same wave under noise."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < NUM_IMAGES:
            raise IndexError(f"image {index} of {NUM_IMAGES}")
        generator = torch.Generator().manual_seed(index)
        angle, frequency, phase = torch.rand(3, generator=generator).tolist()
        axis = torch.linspace(-1.0, 1.0, IMAGE_SIZE)
        direction = math.tau * angle
        distance = math.cos(direction) * axis[:, None] + math.sin(direction) * axis[None, :]
        wave = torch.sin((3.0 + 6.0 * frequency) * distance + math.tau * phase)
        clean = wave.expand(NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE).contiguous()
        noise = torch.randn(clean.shape, generator=generator)
        return {"noisy": clean + 0.5 * noise, "clean": clean}


def build_model() -> nn.Module:
    """The model, with fresh weights on the current default device."""
    return UNet()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random images in the form of a batch."""
    shape = (batch_size, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    return {"noisy": torch.randn(shape), "clean": torch.randn(shape)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared distance to the clean image, per pixel."""
    return F.mse_loss(output, batch["clean"])


def build_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at a constant learning rate."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def build_dataset() -> Dataset[dict[str, Tensor]]:
    """NUM_IMAGES images, the same on every machine."""
    return NoisyWaves()
