"""The user's model, and the executor that takes it over, on one rank."""

from pathlib import Path

import torch

from planner.heap import keep_freed_memory
from planner.model_file import ModelFile
from planner.plan.types import Plan
from runtime.executor import Executor
from runtime.optimize import default_optimizer
from runtime.random import seeded
from runtime.transport import Transport

__all__ = ["build_model", "make_executor"]


def build_model(model_file: ModelFile, seed: int, device: torch.device) -> torch.nn.Module:
    """The model with the weights that this seed gives: the same on every rank."""
    with seeded(seed, device), device:
        return model_file.build_model().train()


def make_executor(
    plan: Plan,
    model_file: ModelFile,
    transport: Transport,
    world_rank: int,
    device: torch.device,
    offload_folder: Path | None = None,
    compile_backend: str | None = None,
) -> Executor:
    """The executor of one rank, with the model freshly built.

    On a CPU the process keeps from now on what it frees, as it did when layers were measured.
    """
    if device.type == "cpu":
        keep_freed_memory()
    return Executor(
        plan,
        build_model(model_file, plan.options.seed, device),
        transport,
        world_rank,
        loss_fn=model_file.loss_fn,
        build_optimizer=model_file.build_optimizer or default_optimizer,
        build_scheduler=model_file.build_scheduler,
        loss_weight=model_file.loss_weight,
        device=device,
        offload_folder=offload_folder,
        compile_backend=compile_backend,
    )
