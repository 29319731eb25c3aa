"""A model file whose second layer, on rank 1, fails at its fifth call as TEST_FAILURE says."""

import os
import signal
import sys
import time

import torch
from torch import Tensor


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if os.environ.get("RANK") == "1" and self.num_calls == 5:
            fail(os.environ.get("TEST_FAILURE"))
        return x * self.weight


class Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.ModuleList(Scale() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


def fail(how: str | None) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "exit":
        sys.exit(3)
    if how == "_exit":
        os._exit(4)
    if how == "raise":
        raise ValueError("the loss is a teapot")
    if how == "sleep":
        time.sleep(100)


def build_model() -> Chain:
    return Chain()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.ones(batch_size, 1)}


def loss_fn(output: Tensor, _: dict[str, Tensor]) -> Tensor:
    return output.mean()
