"""A frozen trunk in evaluation mode below a trained head: no gradient flows into it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH = 8


class Trunk(nn.Module):
    """Keeps its running statistics, as a trunk that somebody else trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3)]
        )
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        for block in self.blocks:
            block.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for block in self.blocks:
                x = x + F.relu(block(x))
        return x


class FrozenStage(nn.Module):
    """The head has three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def build_model() -> nn.Module:
    return FrozenStage()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, WIDTH), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
