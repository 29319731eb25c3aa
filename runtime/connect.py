"""A training loop of one's own: joins the ranks of a plan and hands out this rank's executor.

The script is started as torch's launcher starts scripts (`torchrun --nproc-per-node N script.py`),
or by `python script.py` where the plan has one rank. This module knows processes and devices. It
does not know what the loop does.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from planner.errors import FingerprintError, UsageError
from planner.heap import keep_freed_memory
from planner.model_file import fingerprint
from planner.plan.file import read_plan
from planner.plan.types import Plan
from runtime.code import LossFunction
from runtime.executor import Executor
from runtime.gathering import gather_objects
from runtime.inputs import check_machine
from runtime.local import LocalHub, LocalTransport
from runtime.loss_weights import LossWeight
from runtime.optimize import BuildOptimizer, BuildScheduler, default_optimizer
from runtime.session import device_of, distributed_session, is_launched
from runtime.transport import Transport

__all__ = ["connect"]


@contextmanager
def connect(
    plan: Plan | str | Path,
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    *,
    loss_fn: LossFunction | None = None,
    build_optimizer: BuildOptimizer = default_optimizer,
    build_scheduler: BuildScheduler | None = None,
    loss_weight: LossWeight | None = None,
    offload_folder: str | Path | None = None,
    compile_backend: str | None = None,
) -> Iterator[Executor]:
    """This rank's executor, ready for `step`; all ranks leave the block together.

    Args:
        plan: that passed the checker, or the path of its file.
        model: with the same weights on every rank, or the function that builds it. The executor
            takes it over: parameters of other ranks' stages are let go.
        loss_fn: as in the model file; None where the model returns its loss.
        build_optimizer: as in the model file, called with each unit's parameters; AdamW by default.
        build_scheduler: as in the model file; a constant rate by default.
        loss_weight: as in the model file; every micro-batch weighs the same by default.
        offload_folder: where what the plan offloads is in files, instead of in host memory.
        compile_backend: compile layers and the loss with this backend of torch.compile; what runs
            eagerly all the same is said in a warning on rank 0.

    Raises:
        PlanFileError: the plan's file is missing or damaged.
        FingerprintError: the plan was made for another model.
        UsageError: another number of processes than the plan has ranks, fewer GPUs here than it
            needs, other weights on some rank, an optimizer that cannot work on a partitioned state,
            or a folder in which no file can be made.
        RunError: a rank was lost; the error of another rank ends this one too.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    _check_launched(plan)
    check_machine(plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = device_of(plan)
    if device.type == "cpu":
        keep_freed_memory()
    if not isinstance(model, torch.nn.Module):
        torch.manual_seed(plan.options.seed)
        model = model()
    _check_model(plan, model)
    with _transport(plan, device) as (transport, world_rank):
        _check_same_weights(plan, model, transport, world_rank, device)
        executor = Executor(
            plan,
            model.to(device),
            transport,
            world_rank,
            loss_fn=loss_fn,
            build_optimizer=build_optimizer,
            build_scheduler=build_scheduler,
            loss_weight=loss_weight,
            device=device,
            offload_folder=None if offload_folder is None else Path(offload_folder),
            compile_backend=compile_backend,
        )
        if executor.compile_report is not None and world_rank == 0:
            for line in executor.compile_report.explain():
                warnings.warn(line, stacklevel=3)
        try:
            yield executor
        finally:
            executor.close()


@contextmanager
def _transport(plan: Plan, device: torch.device) -> Iterator[tuple[Transport, int]]:
    if is_launched():
        with distributed_session(plan, device) as found:
            yield found
        return
    transport = LocalTransport(LocalHub(plan.grid, plan.options.deadline_seconds), 0)
    try:
        yield transport, 0
    finally:
        transport.close()


def _check_launched(plan: Plan) -> None:
    if plan.world_size > 1 and not is_launched():
        raise UsageError(
            f"the plan has {plan.world_size} ranks, and this process was started alone",
            hint=f"torchrun --nproc-per-node {plan.world_size} SCRIPT, or plan for --gpus 1",
        )


def _check_model(plan: Plan, model: torch.nn.Module) -> None:
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"the plan was made for another model ({plan.model_name}, fingerprint "
            f"{plan.fingerprint[:12]}) than this one ({type(model).__name__}, fingerprint "
            f"{found[:12]})",
            hint="plan again: lga-plan SCRIPT",
        )


def _check_same_weights(
    plan: Plan, model: torch.nn.Module, transport: Transport, world_rank: int, device: torch.device
) -> None:
    """Ranks that start from different weights would train a model that nobody built."""
    hashes = (torch.hash_tensor(p.detach()) for p in model.parameters() if p.numel())
    mine = hash(tuple(int(each.view(torch.int64)) for each in hashes))
    what = "the weights' hashes"
    found = gather_objects(transport, mine, world_rank, plan.world_size, device, what)
    others = [rank for rank, each in enumerate(found) if each != found[0]]
    if others:
        raise UsageError(
            f"rank {others[0]} built other weights than rank 0",
            hint="seed before the model is built: torch.manual_seed(0)",
        )
