"""Layers in a ModuleDict, parameters in a ParameterList and a ParameterDict, nested containers."""

import torch
from torch import Tensor, nn

WIDTH = 8


class ByName(nn.Module):
    """Calls them by name, and one that is not called at all stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "stem": nn.Linear(6, WIDTH),
                "blocks": nn.ModuleList(
                    [
                        nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "mix": nn.Linear(WIDTH, WIDTH)})
                        for _ in range(3)
                    ]
                ),
                "idle": nn.Linear(WIDTH, WIDTH),
            }
        )
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(3)])
        self.heads = nn.ParameterDict({"y": nn.Parameter(torch.randn(WIDTH, 3) / 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["stem"](x)
        for scale, block in zip(self.scales, self.parts["blocks"], strict=True):
            x = x + scale * torch.relu(block["mix"](block["norm"](x)))
        return x @ self.heads["y"]


def build_model() -> nn.Module:
    return ByName()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 6), "y": torch.randn(batch_size, 3)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (output - batch["y"]).square().mean()
