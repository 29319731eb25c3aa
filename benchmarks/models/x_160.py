"""X_160, the trillion-parameter model of arXiv:2106.02679, for planning only: no weights are made.

160 layers of width 160^2, sequences of 16 x 160 tokens, in half precision. Every block is a layer
for attention and one for its feed-forward network, so that stages can be as small as that.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

SIZE = 160
WIDTH, SEQUENCE_LENGTH = SIZE**2, 16 * SIZE


class Attention(nn.Module):
    """Causal attention of 160 heads, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.inputs(self.norm(hidden)).unflatten(-1, (3, SIZE, SIZE)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        added: Tensor = hidden + self.output(heads.transpose(1, 2).flatten(-2))
        return added


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return added


def build_model() -> nn.Module:
    """Blocks alone, as the paper counts them: embedding and head are left out."""
    layers = [part for _ in range(SIZE) for part in (Attention(), FeedForward())]
    return nn.Sequential(*layers).to(torch.float16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random vectors."""
    hidden = torch.randn(batch_size, SEQUENCE_LENGTH, WIDTH, dtype=torch.float16)
    return {"input": hidden}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean square distance to the input: any loss would do."""
    return (output.float() - batch["input"].float()).square().mean()
