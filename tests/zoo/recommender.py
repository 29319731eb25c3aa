"""A recommender: embedding tables for categories, an MLP for numbers, dot products of all pairs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NUM_DENSE, WIDTH, NUM_HISTORY = 6, 8, 3
TABLE_SIZES = (50, 20, 10)


class Recommender(nn.Module):
    """One table holds bags (a history of items), the others one category per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(
            nn.Linear(NUM_DENSE, 16), nn.ReLU(), nn.Linear(16, WIDTH), nn.ReLU()
        )
        self.tables = nn.ModuleList([nn.Embedding(size, WIDTH) for size in TABLE_SIZES])
        self.history = nn.EmbeddingBag(40, WIDTH, mode="mean")
        num_vectors = len(TABLE_SIZES) + 2
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.top = nn.Sequential(
            nn.Linear(WIDTH + num_vectors * (num_vectors - 1) // 2, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, numbers: Tensor, categories: Tensor, items: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = [dense, self.history(items)]
        vectors += [table(categories[:, index]) for index, table in enumerate(self.tables)]
        stacked = torch.stack(vectors, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        chosen = products[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, chosen], dim=1)).squeeze(1)


def build_model() -> nn.Module:
    return Recommender()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "numbers": torch.randn(batch_size, NUM_DENSE),
        "categories": torch.stack([torch.randint(n, (batch_size,)) for n in TABLE_SIZES], dim=1),
        "items": torch.randint(40, (batch_size, NUM_HISTORY)),
        "clicked": torch.randint(2, (batch_size,)).float(),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, batch["clicked"])
