"""Activation checkpointing already inside: within layers, between them, and over a Sequential."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

WIDTH = 8


class Feed(nn.Module):
    """A residual MLP with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(x))))


class Checkpointed(Feed):
    """A layer that runs a part of itself again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        again = checkpoint(super().forward, x, use_reentrant=self.use_reentrant)
        return self.dropout(again) + checkpoint(self.up, x, use_reentrant=False).sum(-1, True)


class InSegments(nn.Module):
    """A Sequential in two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Feed(), nn.Dropout(0.1), Feed(), Feed())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.inner, 2, x, use_reentrant=False)


class Model(nn.Module):
    """Layers that checkpoint themselves, and layers that the model checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.own = nn.ModuleList([Checkpointed(False), Checkpointed(True), InSegments()])
        self.plain = nn.ModuleList([Feed() for _ in range(4)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.own:
            x = layer(x)
        for index, layer in enumerate(self.plain):
            x = checkpoint(layer, x, use_reentrant=index % 2 == 0)
        return self.head(x)


def build_model() -> nn.Module:
    return Model()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
