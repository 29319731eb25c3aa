"""What a user would pick instead: torch's pipeline schedules, FSDP2 and DDP, each as documented.

Every contender takes a whole step: all micro-batches, the sum over ranks, the update. This module
knows torch's own parallelism. It does not know plans.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from versus_torch_model import Sizes, loss_fn, optimizer, seeded_layers

__all__ = ["CPU", "Batch", "DataParallel", "Pipelined", "Sharding", "gradients_of", "make_theirs"]

CPU = torch.device("cpu")
Batch = dict[str, Tensor]
Part = tuple[str, int, Tensor]
"""Parameter, its first element in flat order, and gradients from there."""
Observe = Callable[[Iterator[Part]], None]


class Sharding(Enum):
    """What FSDP2 does with gathered weights."""

    RESHARD = "let go after each use"
    KEEP = "kept until the update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelined:
    """torch.distributed.pipelining, on `num_replicas` pipelines."""

    schedule: str
    stages_per_rank: int = 1
    num_replicas: int = 1
    """More than one: FSDP2 over them, with weights kept as torchtitan does beside a pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallel:
    """All ranks are replicas: DDP with no_sync, or FSDP2."""

    sharding: Sharding | None = None
    """None: DDP."""


class DataParallelContender:
    """Plain gradient accumulation that is summed over all ranks at the last micro-batch."""

    def __init__(self, sizes: Sizes, kind: DataParallel) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self._sizes, self._kind = sizes, kind
        samples = sizes.global_batch_size // world_size
        self._mine = slice(rank * samples, (rank + 1) * samples)
        model: Any = seeded_layers(sizes)
        if kind.sharding is None:
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (world_size,))
            shard(model, mesh, kind.sharding)
        self._model: Any = model
        self._optimizer = optimizer(sizes, model.parameters())

    def step(self, batch: Batch, observe: Observe | None = None) -> None:
        size = self._sizes.micro_batch_size
        tokens = batch["tokens"][self._mine].split(size)
        targets = batch["targets"][self._mine].split(size)
        for index, (inputs, wanted) in enumerate(zip(tokens, targets, strict=True)):
            with self._quiet(is_last=index == len(tokens) - 1):
                loss = loss_fn(self._model(inputs), wanted) / len(tokens)
                loss.backward()
        if observe is not None:
            observe(gradients_of(self._model))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _quiet(self, *, is_last: bool) -> Any:
        """All micro-batches but the last leave the other ranks alone."""
        if self._kind.sharding is None:
            return nullcontext() if is_last else self._model.no_sync()
        self._model.set_requires_gradient_sync(is_last)
        self._model.set_is_last_backward(is_last)
        if self._kind.sharding is Sharding.KEEP:
            self._model.set_reshard_after_backward(is_last)
        return nullcontext()


class PipelinedContender:
    """Stages cut by hand, and one of torch's schedules; FSDP2 over the replicas."""

    def __init__(self, sizes: Sizes, kind: Pipelined, boundaries: tuple[int, ...]) -> None:
        num_ranks = dist.get_world_size() // kind.num_replicas
        mesh = init_device_mesh("cpu", (num_ranks, kind.num_replicas), mesh_dim_names=("pp", "dp"))
        self._rank, self._num_ranks = mesh.get_local_rank("pp"), num_ranks
        samples = sizes.global_batch_size // kind.num_replicas
        first = mesh.get_local_rank("dp") * samples
        self._mine = slice(first, first + samples)
        mine = range(self._rank, len(boundaries) - 1, num_ranks)
        self._modules = nn.ModuleList(
            seeded_layers(sizes, boundaries[s], boundaries[s + 1]) for s in mine
        )
        if kind.num_replicas > 1:
            for module in self._modules:
                shard(module, mesh["dp"], Sharding.KEEP)
        group = mesh.get_group("pp")
        stages = [
            PipelineStage(module, s, len(boundaries) - 1, CPU, group=group)
            for s, module in zip(mine, self._modules, strict=True)
        ]
        self._schedule = make_schedule(kind.schedule, stages, samples // sizes.micro_batch_size)
        self._optimizer = optimizer(sizes, self._modules.parameters())

    def step(self, batch: Batch, observe: Observe | None = None) -> None:
        inputs = (batch["tokens"][self._mine],) if self._rank == 0 else ()
        is_last = self._rank == self._num_ranks - 1
        target = {"target": batch["targets"][self._mine]} if is_last else {}
        self._schedule.step(*inputs, **target, return_outputs=False)
        if observe is not None:
            observe(part for module in self._modules for part in gradients_of(module))
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_schedule(name: str, stages: list[PipelineStage], num_micro_batches: int) -> Any:
    """One of torch's schedules by its name."""
    match name:
        case "GPipe":
            return ScheduleGPipe(stages[0], num_micro_batches, loss_fn=loss_fn)
        case "1F1B":
            return Schedule1F1B(stages[0], num_micro_batches, loss_fn=loss_fn)
        case "Interleaved1F1B":
            return ScheduleInterleaved1F1B(stages, num_micro_batches, loss_fn=loss_fn)
    return ScheduleLoopedBFS(stages, num_micro_batches, loss_fn=loss_fn)


def shard(model: nn.Module, mesh: DeviceMesh, sharding: Sharding) -> None:
    """FSDP2 on every layer, then on what holds them."""
    reshard = sharding is Sharding.RESHARD
    for layer in model.children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    assert isinstance(model, FSDPModule)


def gradients_of(model: nn.Module) -> Iterator[Part]:
    """Whole gradients; with FSDP2 a collective over the replicas."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        yield name.removeprefix("module."), 0, whole.reshape(-1)


def make_theirs(
    sizes: Sizes, kind: Pipelined | DataParallel, boundaries: tuple[int, ...]
) -> DataParallelContender | PipelinedContender:
    """Built on this rank, with the weights of the seed."""
    if isinstance(kind, DataParallel):
        return DataParallelContender(sizes, kind)
    return PipelinedContender(sizes, kind, boundaries)
