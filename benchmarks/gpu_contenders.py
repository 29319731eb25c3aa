"""What benchmarks/gpu.py compares on one device: plans, FSDP2, and the layers with no runtime.

Each contender is built by itself and takes whole steps: all micro-batches and the update. This
module knows how each trains. It does not time anything.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from versus_torch_model import Sizes, layers_of, loss_fn, model_file, optimizer, seeded_layers

from planner.cluster import resolve_cluster
from planner.model_file import ModelFile
from planner.plan.types import Instruction, Plan
from planner.precision import Precision
from planner.prepare import prepare
from planner.schedules import Schedule
from planner.solve import Placement
from planner.timeline import Timeline
from runtime.executor import Executor
from runtime.local import LocalHub, LocalTransport

__all__ = ["ByHand", "Contender", "Fsdp", "Planned", "example_batch", "in_memory", "offloaded"]

Batch = dict[str, Tensor]


class Contender(Protocol):
    """One way of training."""

    def step(self, batch: Batch) -> Tensor:
        """One update; the loss of the last micro-batch, not read."""


def example_batch(sizes: Sizes) -> Batch:
    """The same for all."""
    torch.manual_seed(1)
    return model_file(sizes).example_batch(sizes.global_batch_size)


class Planned:
    """The executor of a plan, with the weights that all contenders begin with."""

    def __init__(self, sizes: Sizes, plan: Plan, layers: nn.Module, device: torch.device) -> None:
        """The layers are taken over."""
        self._plan, file = plan, model_file(sizes)
        transport = LocalTransport(LocalHub(plan.grid, plan.options.deadline_seconds), 0)
        assert file.build_optimizer is not None
        self._executor = Executor(
            plan, layers.to(device), transport, 0, loss_fn=file.loss_fn,
            build_optimizer=file.build_optimizer, device=device,
        )  # fmt: skip

    def step(self, batch: Batch) -> Tensor:
        self._result = self._executor.step(batch)
        return self._result.losses[-1]

    def last_step(self) -> tuple[Sequence[Instruction], Timeline]:
        """The program, and when its instructions ran."""
        return self._plan.programs[0], self._result.timeline


def offloaded(sizes: Sizes, schedule: Schedule, device: torch.device) -> Planned:
    """State in host memory, computing in bfloat16 with float32 masters.

    Layered, every layer's state comes once for the forward and once for the backward of all
    micro-batches, whose inputs are kept; in plain order it comes for each micro-batch. Both
    recompute, or they would not fit.
    """
    made = _plan(sizes, model_file(sizes), schedule, Precision.BFLOAT16, is_offloaded=True)
    return Planned(sizes, made, seeded_layers(sizes), device)


def in_memory(sizes: Sizes, device: torch.device) -> Planned:
    """The whole state on the device, in bfloat16, nothing recomputed."""
    made = _plan(sizes, _half(sizes), Schedule.LAYERED, Precision.MODEL, is_offloaded=False)
    return Planned(sizes, made, seeded_layers(sizes).to(torch.bfloat16), device)


def _half(sizes: Sizes) -> ModelFile:
    """The model in bfloat16 altogether."""
    return replace(
        model_file(sizes), build_model=lambda: layers_of(sizes).to(torch.bfloat16), name="gpt-half"
    )


def _plan(
    sizes: Sizes, model: ModelFile, schedule: Schedule, precision: Precision, *, is_offloaded: bool
) -> Plan:
    """A stage for every layer."""
    prepared = prepare(
        model,
        num_devices=1,
        cluster=resolve_cluster("h200", 1),
        global_batch_size=sizes.global_batch_size,
        precision=precision,
    )
    placement = Placement(
        num_replicas=1,
        num_pipeline_ranks=1,
        boundaries=tuple(range(sizes.num_layers + 1)),
        stage_ranks=(0,) * sizes.num_layers,
        micro_batch_size=sizes.micro_batch_size,
        num_micro_batches=sizes.global_batch_size // sizes.micro_batch_size,
        partition=0,
        recompute=(is_offloaded,) * sizes.num_layers,
        schedule=schedule,
        offload_state=is_offloaded,
    )
    return prepared.lowered(placement)[0]


class Fsdp:
    """FSDP2 with CPUOffloadPolicy on one rank, and its optimizer on the CPU, as documented."""

    def __init__(self, sizes: Sizes, device: torch.device, *, sums_on_device: bool) -> None:
        """
        Args:
            sizes: of the model and batch.
            device: where it computes.
            sums_on_device: gradients leave after the last micro-batch; else after each.
        """
        self._sizes, self._sums_on_device, self._device = sizes, sums_on_device, device
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        model = seeded_layers(sizes)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (1,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
        }
        for layer in model.children():
            fully_shard(layer, **options)
        fully_shard(model, **options)
        assert isinstance(model, FSDPModule)
        self._model: Any = model
        self._optimizer = optimizer(replace(sizes, is_fused=True), model.parameters())

    def step(self, batch: Batch) -> Tensor:
        size = self._sizes.micro_batch_size
        tokens, targets = (batch[key].split(size) for key in ("tokens", "targets"))
        for index, (inputs, wanted) in enumerate(zip(tokens, targets, strict=True)):
            is_last = index == len(tokens) - 1
            if self._sums_on_device:
                self._model.set_requires_gradient_sync(is_last)
            self._model.set_is_last_backward(is_last)
            scores = self._model(inputs.to(self._device, non_blocking=True))
            loss = loss_fn(scores, wanted.to(self._device, non_blocking=True))
            (loss / len(tokens)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


class ByHand:
    """The layers of `in_memory` one after the other in its order, and nothing else."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self._sizes = sizes
        self._layers: list[nn.Module] = list(
            seeded_layers(sizes).to(device, torch.bfloat16).children()
        )
        self._optimizers = [optimizer(sizes, layer.parameters()) for layer in self._layers]

    def step(self, batch: Batch) -> Tensor:
        """`batch` is on the device."""
        size, last = self._sizes.micro_batch_size, len(self._layers) - 1
        values = list(batch["tokens"].split(size))
        targets = batch["targets"].split(size)
        held: list[list[tuple[Tensor, Tensor]]] = []
        for index, layer in enumerate(self._layers):
            pairs = []
            for m, value in enumerate(values):
                given = value.detach().requires_grad_(value.is_floating_point())
                values[m] = layer(given)
                if index == last:
                    values[m] = loss_fn(values[m], targets[m])
                pairs.append((given, values[m]))
            held.append(pairs)
        gradients: list[Tensor | None] = [torch.ones_like(x) / len(values) for x in values]
        for index in reversed(range(len(self._layers))):
            for m, (given, output) in enumerate(held.pop()):
                output.backward(gradients[m])
                gradients[m] = given.grad
            self._optimizers[index].step()
            self._optimizers[index].zero_grad()
        return values[-1].detach()
