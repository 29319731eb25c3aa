"""LSTM and GRU layers, one of them bidirectional, which hand on their states."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY, WIDTH, LENGTH = 20, 8, 5


class Recurrent(nn.Module):
    """The second LSTM begins with the first one's state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.first = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)
        self.second = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.third = nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, state = self.first(self.tokens(tokens))
        hidden, _ = self.second(hidden, state)
        hidden, _ = self.third(hidden)
        return self.head(hidden)


def build_model() -> nn.Module:
    return Recurrent()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    shape = (batch_size, LENGTH)
    return {key: torch.randint(VOCABULARY, shape) for key in ("tokens", "targets")}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten())
