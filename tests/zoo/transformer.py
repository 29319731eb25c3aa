"""torch's own nn.Transformer: encoder and decoder, the decoder reads the encoder's memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY, WIDTH, LENGTH = 32, 16, 6


class Translator(nn.Module):
    """One embedding for both sides and the head: a weight in three places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32, dropout=0.1,
            batch_first=True,
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=source.device)
        hidden = self.transformer(self.tokens(source), self.tokens(target), tgt_mask=mask)
        return self.head(hidden)


def build_model() -> nn.Module:
    return Translator()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    shape = (batch_size, LENGTH)
    return {key: torch.randint(VOCABULARY, shape) for key in ("source", "target", "labels")}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())
