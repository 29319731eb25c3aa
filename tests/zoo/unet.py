"""A diffusion U-Net: every block reads an embedding of the time, attention stands in the middle."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, NUM_TIME = 8, 16


class Block(nn.Module):
    """A normalised convolution, shifted by the time."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, num_inputs)
        self.convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1)
        self.time = nn.Linear(NUM_TIME, num_outputs)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift = self.time(time)[:, :, None, None]
        return F.dropout(self.convolution(F.silu(self.norm(hidden))) + shift, 0.1, self.training)


class Attention(nn.Module):
    """Between all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        pixels = hidden.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(pixels, pixels, pixels, need_weights=False)
        return hidden + mixed.transpose(1, 2).unflatten(2, hidden.shape[2:])


class UNet(nn.Module):
    """Two resolutions down and up, with skips between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down = nn.ModuleList([Block(WIDTH, WIDTH), Block(WIDTH, 2 * WIDTH)])
        self.middle = Attention(2 * WIDTH)
        self.up = nn.ModuleList([Block(4 * WIDTH, WIDTH), Block(2 * WIDTH, WIDTH)])
        self.widen = nn.ModuleList(
            [nn.ConvTranspose2d(2 * WIDTH, 2 * WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2)]
        )
        self.head = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        frequencies = torch.arange(NUM_TIME // 2, device=time.device) * (-math.log(100.0) / 8)
        angles = time[:, None] * frequencies.exp()
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
        hidden, skips = self.stem(noisy), []
        for block in self.down:
            hidden = block(hidden, embedded)
            skips.append(hidden)
            hidden = F.avg_pool2d(hidden, 2)
        hidden = self.middle(hidden)
        for widen, block in zip(self.widen, self.up, strict=True):
            hidden = block(torch.cat([widen(hidden), skips.pop()], dim=1), embedded)
        return self.head(hidden)


def build_model() -> nn.Module:
    return UNet()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "noisy": torch.randn(batch_size, 1, 8, 8),
        "time": torch.rand(batch_size),
        "noise": torch.randn(batch_size, 1, 8, 8),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(output, batch["noise"])
