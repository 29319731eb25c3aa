"""What a training loop asks of one rank's executor between steps: its state, in and out.

The public state is by parameter, whatever the plan made of it: whole tensors, or a checkpoint that
any plan of the same model takes up. This module knows names and collectives. It does not know when
anything runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.errors import RunError, UsageError
from planner.plan.types import Plan
from runtime.checkpoint import CheckpointInfo, load_training, save_training
from runtime.checkpoint.rank import put_parameters
from runtime.gathering import sum_over_ranks
from runtime.hooks import GradientPart, Gradients, Hooks, Remove, parts_of_gradient
from runtime.host import Checkpoint
from runtime.result import StepResult
from runtime.shards import UnitState
from runtime.state import GradientObserver, RankState
from runtime.transport import Traffic

__all__ = ["TrainingState"]


class TrainingState:
    """The state of one rank; `Executor` adds what runs."""

    def __init__(self, plan: Plan, model: torch.nn.Module, rank: RankState) -> None:
        self.plan = plan
        self._model = model
        self._rank = rank
        self._broken = ""
        """Why nothing can be run any more."""
        self.training = True
        """Whether `train` or `eval` was called last."""
        self._before_step: Hooks[Callable[[Mapping[str, Tensor]], object]] = Hooks()
        self._after_step: Hooks[Callable[[StepResult], object]] = Hooks()
        self._on_gradient: Hooks[GradientObserver] = Hooks()

    @property
    def num_steps(self) -> int:
        """Steps taken so far, those before a checkpoint that was loaded included."""
        return self._rank.step

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that left this rank so far."""
        return self._rank.transport.traffic

    @property
    def learning_rate(self) -> float | None:
        """That the next update will use, of the first parameter group of this rank that has
        parameters; None where the rank trains nothing."""
        for optimizer in self._rank.optimizers.values():
            for group in optimizer.optimizer.param_groups:
                if group["params"]:
                    return float(group["lr"])
        return None

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """This rank's, one for each unit: settings of their groups may be changed between steps."""
        return tuple(found.optimizer for found in self._rank.optimizers.values())

    def train(self) -> None:
        """Modules go to training mode, and steps may be taken: so it is at first."""
        self._model.train()
        self.training = True

    def eval(self) -> None:
        """Modules go to evaluation mode; `evaluate` needs no call of it."""
        self._model.eval()
        self.training = False

    def before_step(self, function: Callable[[Mapping[str, Tensor]], object]) -> Remove:
        """Call `function` with the batch before every step; returns what takes it away again."""
        return self._before_step.add(function)

    def after_step(self, function: Callable[[StepResult], object]) -> Remove:
        """Call `function` with the result of every step; returns what takes it away again."""
        return self._after_step.add(function)

    def on_gradient(self, function: Callable[[GradientPart], object]) -> Remove:
        """Call `function` with each parameter's whole gradient, or this rank's part of it, before
        its update; returns what takes it away again.

        It is called on every rank for what that rank updates, as soon as the unit's gradient is
        complete: in the middle of the step's backward where the plan updates there.
        """

        def observe(state: UnitState, gradient: Tensor) -> None:
            for part in parts_of_gradient(state, gradient):
                function(part)

        return self._observe(observe)

    @contextmanager
    def kept_gradients(self) -> Iterator[Gradients]:
        """Keep a copy of each gradient of the one step that is taken inside."""
        gradients = Gradients(self._rank.transport)
        remove = self._observe(gradients.keep)
        try:
            yield gradients
        finally:
            remove()

    def observe(self, observer: GradientObserver | None) -> None:
        """Call `observer`, and no other, before every update with the unit and its gradient."""
        self._rank.observer = observer

    def _observe(self, observer: GradientObserver) -> Remove:
        remove = self._on_gradient.add(observer)
        observers = self._on_gradient.functions

        def call_all(state: UnitState, gradient: Tensor) -> None:
            for each in observers:
                each(state, gradient)

        def remove_it() -> None:
            remove()
            self._rank.observer = call_all if observers else None

        self._rank.observer = call_all
        return remove_it

    def mean_loss(self, result: StepResult) -> float:
        """The mean over the whole batch, on every rank: a collective of all ranks, so a loop that
        calls it on one must call it on all.

        Raises:
            RunError: a rank was lost.
        """
        figures = [0.0, 0.0]
        if result.losses:
            weight = sum(result.weights) if result.weights else float(len(result.losses))
            figures = [(result.loss or 0.0) * weight if weight else 0.0, weight]
        transport, device = self._rank.transport, self._rank.device
        total, weight = sum_over_ranks(transport, figures, device, "the mean loss").tolist()
        return total / weight if weight else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters of this rank's stages and buffers of their modules, by name.

        As in the model's own state_dict, buffers that are made anew are not part of it.
        In mixed precision parameters are the float32 masters, buffers are of the compute type.
        Where weights or masters are partitioned this is a collective over the replicas.
        """
        found: dict[str, Tensor] = {}
        for state in self._rank.units.values():
            is_apart = state.gathered or state.has_copy
            flat = shard = self._shard(state) if is_apart else state.whole
            if is_apart and state.partitioned:
                flat = shard.new_empty(state.padded_length)
                what = f"state of unit {state.unit.name}"
                self._rank.transport.gather(shard, flat, what).wait()
            found.update({name: view.clone() for name, view in state.views(flat)})
        return found | {name: buffer.clone() for name, buffer in self._saved_buffers().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters and buffers from the whole model's state_dict; further names are let be.

        What optimizers keep stays as it is: `load` takes up a whole training state.

        Raises:
            UsageError: a tensor of this rank's stages is missing or of another shape; nothing has
                been changed then.
            RunError: the executor is closed or was stopped by an error.
        """
        self._check_usable()
        put_parameters(self._rank, state, self._saved_buffers())

    def save(self, folder: str | Path, data: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint: parameters, buffers, optimizer and scheduler state, step and seed.

        All ranks call it together, with a folder that all of them see. It is written by
        torch.distributed.checkpoint, aside first, and has its name only when it is whole.

        Args:
            folder: replaced if it is a checkpoint.
            data: plain values that `load` gives back, such as the position in the data.

        Raises:
            UsageError: the folder cannot be written or holds something else, or the optimizer
                keeps what cannot be read again without running code.
            RunError: a rank was lost, or the executor is closed or was stopped by an error.
        """
        self._check_usable()
        buffers = self._saved_buffers()
        save_training(self._rank, self._model, buffers, Path(folder), data or {})

    def load(self, path: str | Path) -> CheckpointInfo:
        """Go on from a checkpoint that any plan of the same model has written.

        All ranks call it. With one replica, steps from here on are bitwise those that the run
        would have taken that wrote it.

        Args:
            path: a checkpoint, or a folder of checkpoints, of which the last is taken.

        Raises:
            UsageError: there is no whole checkpoint, or it is of another seed than the plan.
            FingerprintError: it is of another model.
            RunError: the executor is closed or was stopped by an error.
        """
        self._check_usable()
        return load_training(self._rank, self._saved_buffers(), Path(path))

    def checkpoint(self) -> Checkpoint:
        """This rank's part of the state after the last whole step, in host memory.

        It stays as it is while later steps run. All ranks' parts of one step make a whole state.

        Raises:
            UsageError: the plan saves none.
        """
        if not self.plan.options.save:
            raise UsageError(
                "the plan leaves no checkpoint after its steps",
                hint="plan again with the option to save",
            )
        return self._rank.host.checkpoint

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers of the modules in this rank's stages, by name."""
        return {name: buffer.clone() for name, buffer in self._buffers()}

    def resident_tensors(self) -> list[Tensor]:
        """Everything that stays allocated between steps."""
        return [*self._rank.resident_tensors(), *self._model.buffers()]

    def _check_usable(self) -> None:
        if self._broken:
            raise RunError(
                f"this executor {self._broken}, so it cannot go on",
                hint="build a new Executor",
            )

    def _shard(self, state: UnitState) -> Tensor:
        """On the device, wherever it lives."""
        if "shard" not in self.plan.offloaded:
            return state.shard
        shard, pending = self._rank.host.fetch(f"host:shard:{state.unit.name}")
        pending.wait()
        assert isinstance(shard, Tensor)
        return shard

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        paths = {s.path for stage in self._rank.stages.values() for s in stage.plan.code if s.path}
        for path in sorted(paths):
            yield from self._model.get_submodule(path).named_buffers(prefix=path)

    def _saved_buffers(self) -> dict[str, Tensor]:
        """Those that a state_dict has: the modules' own, not copies."""
        saved = self._model.state_dict().keys()
        return {name: buffer for name, buffer in self._buffers() if name in saved}
