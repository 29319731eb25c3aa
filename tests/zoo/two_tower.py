"""Two towers, one for each side of a pair, and a contrastive loss with a learned temperature."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH = 8


class Tower(nn.Module):
    """An MLP onto the unit sphere."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.last = nn.Linear(16, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        for block in self.blocks:
            hidden = hidden + F.gelu(block(hidden))
        return F.normalize(self.last(hidden), dim=-1)


class TwoTower(nn.Module):
    """Returns the similarity of every pair in the micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = Tower(6), Tower(10)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        similarity = self.query(query) @ self.document(document).T
        return similarity * self.scale.exp()


def build_model() -> nn.Module:
    return TwoTower()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"query": torch.randn(batch_size, 6), "document": torch.randn(batch_size, 10)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    pairs = torch.arange(len(output), device=batch["query"].device)
    return (F.cross_entropy(output, pairs) + F.cross_entropy(output.T, pairs)) / 2
