"""The script `plain_training.py`, trained by a plan: what differs is marked with `# lga`."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import runtime  # lga

TEXT = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
CONTEXT, WIDTH, NUM_STEPS, BATCH_SIZE = 32, 64, 10, 16


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


build_model, example_batch = Model, get_batch  # lga: what lga-plan looks for


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    with runtime.connect("plan.yaml", model, loss_fn=loss_fn) as executor:  # lga: AdamW by default
        for step in range(NUM_STEPS):
            result = executor.step(get_batch(BATCH_SIZE))  # lga
            loss = executor.mean_loss(result)  # lga
            if executor.world_rank == 0:
                print(f"step {step} loss {loss:.9f}")


if __name__ == "__main__":
    main()
