"""One layer called three times along the model, beside layers that are called once."""

import torch
from torch import Tensor, nn

WIDTH = 8


class SharedLayer(nn.Module):
    """The shared one stands first, in the middle and last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.own = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(self.stem(x)))
        for layer in self.own:
            x = x + torch.tanh(self.shared(torch.tanh(layer(x))))
        return self.head(x)


def build_model() -> nn.Module:
    return SharedLayer()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
