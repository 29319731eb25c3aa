"""One rank of a plan's schedule in torch's own pipelining runtime, on gloo.

As a program (`python tests/pipelining_ranks.py FOLDER RANK NUM_RANKS`) it reads stages.json, the
weights, the batch and the CSVs from FOLDER, takes one step by each CSV, and leaves the gradients
of its parameters in `<format>.<rank>.pt`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

__all__ = ["FORMATS", "Residual", "ResidualChain", "batch", "build", "loss_of"]

FORMATS = ("compute_only", "compute_comms")
NUM_LAYERS = 8
WIDTH = 16


class Residual(nn.Module):
    """x + W2 tanh(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.second(self.first(x).tanh())
        return output


class ResidualChain(nn.Module):
    """Equal layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build() -> ResidualChain:
    return ResidualChain()


def batch(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, WIDTH), "y": torch.randn(batch_size, WIDTH)}


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def gradients(folder: Path, rank: int, csv_format: str) -> dict[str, Tensor]:
    """One step by the CSV of this format."""
    words = json.loads((folder / "stages.json").read_text())
    weights = torch.load(folder / "weights.pt", weights_only=True)
    data = torch.load(folder / "batch.pt", weights_only=True)
    model = build()
    model.load_state_dict(weights)
    stages = [
        PipelineStage(
            nn.Sequential(*(model.get_submodule(layer) for layer in stage["layers"])),
            index,
            len(words["stages"]),
            torch.device("cpu"),
        )
        for index, stage in enumerate(words["stages"])
        if stage["rank"] == rank
    ]
    schedule = _PipelineScheduleRuntime(stages, words["num_micro_batches"], loss_fn=loss_of)
    schedule._load_csv(str(folder / f"{csv_format}.csv"), format=csv_format)
    has_first = any(stage.is_first for stage in stages)
    has_last = any(stage.is_last for stage in stages)
    arguments = (data["x"],) if has_first else ()
    schedule.step(*arguments, target=data["y"] if has_last else None)
    mine = {layer for s in words["stages"] if s["rank"] == rank for layer in s["layers"]}
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ".".join(name.split(".")[:2]) in mine
    }


def main(folder: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=num_ranks
    )
    for csv_format in FORMATS:
        torch.save(gradients(folder, rank, csv_format), folder / f"{csv_format}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
