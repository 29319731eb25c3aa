"""A frozen base with trainable low-rank additions, and a trainable head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, RANK, NUM_LAYERS = 12, 2, 4


class LowRank(nn.Module):
    """A frozen linear layer and its low-rank addition; dropout on the way into the addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.dropout(x)))


class Block(nn.Module):
    """Its norm is frozen too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.mix = LowRank(nn.Linear(WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.mix(self.norm(x))))


class LoRA(nn.Module):
    """No gradient flows into the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


def build_model() -> nn.Module:
    return LoRA()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "tokens": torch.randint(20, (batch_size, 5)),
        "labels": torch.randint(3, (batch_size,)),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch["labels"])
