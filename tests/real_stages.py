"""Stages of a plan on real tensors, one after another, with every storage followed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner.model_file import ModelFile
from planner.plan.types import Plan, StagePlan
from planner.storages import LiveStorages, storage_key, tensors_in
from runtime.random import KeyedRandom
from runtime.stage import Stage

__all__ = ["Found", "planned_bytes", "run_stages"]

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Bytes of one micro-batch in a stage, above its parameters, inputs and given gradients."""

    saved: int
    """Alive between forward (or recompute) and backward, less what the stage hands on."""
    forward: int
    """Peaks."""
    recompute: int
    backward: int


class _Watcher(TorchDispatchMode):
    def __init__(self, live: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.live.watch(tensor)
        return result


def planned_bytes(stage: StagePlan) -> Found:
    """The same of the plan."""
    forward = stage.forward_transient_bytes
    recompute = stage.recompute_transient_bytes
    return Found(
        saved=stage.saved_bytes,
        forward=forward if stage.recompute else stage.saved_bytes + forward,
        recompute=stage.saved_bytes + recompute if stage.recompute else 0,
        backward=stage.saved_bytes + stage.backward_transient_bytes,
    )


def run_stages(plan: Plan, model_file: ModelFile, num_runs: int = 2) -> list[Found]:
    """Every stage, forward and backward; several runs, of which the last counts."""
    torch.manual_seed(0)
    model = model_file.build_model().train()
    batch = model_file.example_batch(plan.micro_batch_size)
    random = KeyedRandom(0)
    carried = frozenset(t.name for t in plan.tensors if t.requires_grad)
    stages = [
        Stage(stage, carried, model, model_file.loss_fn, _CPU, random) for stage in plan.stages
    ]
    found: list[Found] = []
    for run in range(num_runs):
        random.begin(step=run, replica=0, micro_batch=0)
        made: dict[str, Tensor] = {}
        found = [_Run(stage, model, carried, made, batch).measure() for stage in stages]
    return found


class _Run:
    """One micro-batch through one stage."""

    def __init__(
        self,
        stage: Stage,
        model: nn.Module,
        carried: frozenset[str],
        made: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> None:
        self.stage, self.model, self.carried, self.made = stage, model, carried, made
        self.inputs = {name: made[name] for name in stage.plan.inputs}
        self.batch = {key: batch[key] for key in stage.plan.batch_keys}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def measure(self) -> Found:
        live = self._following()
        recompute_peak = 0
        with _Watcher(live):
            if self.stage.plan.recompute:
                outputs = self.stage.forward(self.inputs, self.batch, 0)
                forward_peak = live.peak_bytes
                before = self._following()
                with _Watcher(before):
                    saved = self.stage.recompute(self.inputs, self.batch, 0)
                recompute_peak, live = before.peak_bytes, before
                kept = live.live_bytes
            else:
                outputs, saved = self.stage.forward_saving(self.inputs, self.batch)
                forward_peak = live.peak_bytes
                live.ignore(self.model.buffers())  # new ones take the places of old ones
                kept = live.live_bytes - _bytes(live, outputs.values())
        self.made.update(outputs)
        gradients = self._gradients(outputs)
        live.ignore(gradients.values())
        before_bytes = live.restart()
        with _Watcher(live):
            self.stage.backward(saved, gradients)
        return Found(
            saved=kept,
            forward=forward_peak,
            recompute=recompute_peak,
            backward=kept + live.peak_bytes - before_bytes,
        )

    def _following(self) -> LiveStorages:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        state: Iterable[Tensor] = (*self.model.parameters(), *self.model.buffers(), *gradients)
        return LiveStorages((*state, *self.inputs.values(), *self.batch.values()))

    def _gradients(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.ones_like(tensor)
            for name, tensor in outputs.items()
            if name == "loss" or name in self.carried
        }


def _bytes(live: LiveStorages, tensors: Iterable[Tensor]) -> int:
    storages = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for key, size in storages.items() if live.follows(key))
