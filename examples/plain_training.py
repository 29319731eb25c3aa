"""A training script as people write it, for one device: bytes of text, gradients accumulated."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TEXT = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
CONTEXT, WIDTH, NUM_STEPS, BATCH_SIZE, NUM_PARTS = 32, 64, 10, 16, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, inputs: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=inputs.device)
        hidden = self.embedding(inputs)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask)
        return self.head(hidden)


def get_batch(size: int) -> dict[str, Tensor]:
    windows = torch.randint(len(TEXT) - CONTEXT, (size, 1)) + torch.arange(CONTEXT + 1)
    return {"inputs": TEXT[windows[:, :-1]], "targets": TEXT[windows[:, 1:]]}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten())


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(NUM_STEPS):
        batch, loss = get_batch(BATCH_SIZE), 0.0
        optimizer.zero_grad()
        for rows in torch.arange(BATCH_SIZE).chunk(NUM_PARTS):
            part = {key: value[rows] for key, value in batch.items()}
            part_loss = loss_fn(model(part["inputs"]), part)
            (part_loss / NUM_PARTS).backward()
            loss += part_loss.item() / NUM_PARTS
        optimizer.step()
        print(f"step {step} loss {loss:.9f}")


if __name__ == "__main__":
    main()
