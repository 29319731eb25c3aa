"""Weights of three types: bfloat16 blocks, float32 norms, a float64 head; autocast in a layer."""

import torch
from torch import Tensor, nn

WIDTH = 8


class Block(nn.Module):
    """Normalises in float32 and multiplies in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.mix(self.norm(x.float()).bfloat16()))


class Cast(nn.Linear):
    """Keeps float32 weights and multiplies in bfloat16, as autocast chooses."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.autocast(input.device.type, torch.bfloat16):
            return super().forward(input)


class SeveralDtypes(nn.Module):
    """bfloat16 between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList([Block(), Block(), Cast(WIDTH, WIDTH), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x.bfloat16())
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden.float()).double()).float()


def build_model() -> nn.Module:
    return SeveralDtypes()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
