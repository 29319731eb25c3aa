"""Steps of executors on every rank of a plan, and the same by plain accumulation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from planned import Chain, model_of
from torch import Tensor, nn

from planner.model_file import ModelFile
from planner.plan.types import Plan
from planner.schedules import Schedule
from runtime.build import make_executor
from runtime.executor import Executor
from runtime.local import run_local
from runtime.reference import accumulate, loss_of_model

__all__ = [
    "CPU", "LAYOUTS", "assert_close", "batches", "linears", "on_every_rank", "plain_gradients",
    "whole_state",
]  # fmt: skip

CPU = torch.device("cpu")
Batch = Mapping[str, Tensor]

LAYOUTS = [
    {"schedule": Schedule.LAYERED},
    {"schedule": Schedule.ZERO_BUBBLE, "offload_state": True},
    {"schedule": Schedule.LAYERED, "num_replicas": 2, "partition": 3},
    {"schedule": Schedule.PLAIN, "num_replicas": 2, "partition": 3},
    {"schedule": Schedule.LAYERED, "num_replicas": 2, "partition": 1},
    {"schedule": Schedule.LAYERED, "num_replicas": 2, "partition": 2, "offload_state": True},
    {"schedule": Schedule.ONE_F_ONE_B, "num_replicas": 2, "partition": 0},
]


def linears() -> ModelFile:
    """Four linear layers and a head, trained by AdamW with a falling rate."""
    return replace(
        model_of(lambda: Chain(lambda: nn.Linear(8, 8))),
        build_optimizer=torch.optim.AdamW,
        build_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )


def on_every_rank(
    made: Plan, model_file: ModelFile, function: Callable[[Executor], Any]
) -> list[Any]:
    def run(transport: Any, world_rank: int) -> Any:
        executor = make_executor(made, model_file, transport, world_rank, CPU)
        try:
            return function(executor)
        finally:
            executor.close()

    return run_local(made, run)


def batches(made: Plan, model_file: ModelFile, step: int) -> list[dict[str, Tensor]]:
    """One batch for each replica."""
    torch.manual_seed(100 + step)
    return [
        dict(model_file.example_batch(made.replica_batch_size)) for _ in range(made.num_replicas)
    ]


def plain_gradients(
    made: Plan, model_file: ModelFile, model: nn.Module, step: int, given: list[dict[str, Tensor]]
) -> list[Tensor]:
    """By plain accumulation, left in the model; the losses."""
    size = made.micro_batch_size
    rows = [
        (replica, m, {key: v[m * size : (m + 1) * size] for key, v in batch.items()})
        for replica, batch in enumerate(given)
        for m in range(made.num_micro_batches)
    ]
    return accumulate(
        model, loss_of_model(model, model_file), rows, seed=made.options.seed, step=step
    )


def whole_state(made: Plan, parts: list[dict[str, Tensor]], replica: int = 0) -> dict[str, Tensor]:
    """Of one replica, from the parts of all ranks."""
    ranks = [made.world_rank(rank, replica) for rank in range(made.num_pipeline_ranks)]
    return {key: value for rank in ranks for key, value in parts[rank].items()}


def assert_close(mine: Tensor, plain: Tensor, relative: float) -> None:
    assert float((mine - plain).norm()) <= relative * float(plain.norm())
