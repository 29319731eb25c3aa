"""torch's own nn.TransformerEncoder, with a mask and dropout, between an embedding and a head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY, WIDTH, LENGTH = 32, 16, 6


class Encoder(nn.Module):
    """Causal."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=tokens.device)
        hidden = self.tokens(tokens) + self.positions
        return self.head(self.encoder(hidden, mask=mask, is_causal=True))


def build_model() -> nn.Module:
    return Encoder()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    shape = (batch_size, LENGTH)
    return {key: torch.randint(VOCABULARY, shape) for key in ("tokens", "targets")}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten())
