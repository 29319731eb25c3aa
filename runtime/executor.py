"""The executor: one loop over the rank's program. It decides nothing.

Transfers, collectives and copies are started where they stand in the program and are waited for by
the first instruction that conflicts with their buffers.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import RunError, UsageError
from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule
from planner.timeline import Event, Timeline
from runtime.code import LossFunction
from runtime.handlers import HANDLERS
from runtime.host import Checkpoint
from runtime.inputs import check_batch
from runtime.optimize import BuildOptimizer, BuildScheduler, default_optimizer
from runtime.program import Program
from runtime.shards import UnitState
from runtime.state import GradientObserver, RankState
from runtime.transport import Traffic, Transport

__all__ = ["Executor", "StepResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step, or one evaluation, on one rank."""

    losses: tuple[Tensor, ...]
    """Loss of each micro-batch of this replica; empty on ranks without the last stage."""
    timeline: Timeline
    """Measured, in this rank's clock from the start of the step."""
    finite: bool | None = None
    """Whether every gradient on every rank was finite; if not, nothing was updated anywhere. None
    where the plan does not check it."""
    gradient_norm: float | None = None
    """Of the whole model, before clipping; None where the plan does not clip."""

    @property
    def loss(self) -> float | None:
        """Mean over this replica's micro-batches, None where the last stage is elsewhere."""
        return float(torch.stack(self.losses).mean()) if self.losses else None


class Executor:
    """Runs one rank's part of a plan."""

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        transport: Transport,
        world_rank: int,
        *,
        loss_fn: LossFunction | None = None,
        build_optimizer: BuildOptimizer = default_optimizer,
        build_scheduler: BuildScheduler | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take this rank's parameters out of `model`; the others' memory is let go.

        Args:
            plan: a plan that passed the checker.
            model: freshly built, with the same weights on every rank, on `device`.
            transport: connects this rank with the others.
            world_rank: torch.distributed's rank; pipeline rank and replica follow from it.
            loss_fn: as in the model file; None where the model returns its loss.
            build_optimizer: as in the model file; AdamW by default.
            build_scheduler: as in the model file; a constant rate by default.
            device: where this rank computes.

        Raises:
            UsageError: the optimizer cannot work on a partitioned state.
            PlanFileError: the plan's code names something that the model does not have, or its
                buffers do not fit the model's parameters.
        """
        self.plan = plan
        self._model = model.train()
        self._rank = RankState(
            plan,
            model,
            transport,
            world_rank,
            loss_fn,
            build_optimizer,
            build_scheduler,
            torch.device(device),
        )
        self._broken = ""
        self.device = self._rank.device
        self.rank, self.replica = self._rank.rank, self._rank.replica
        programs = (self._rank.training, self._rank.evaluation)
        self.loads_batch = any(i.opcode is Opcode.LOAD for p in programs for i in p.instructions)

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that left this rank so far."""
        return self._rank.transport.traffic

    def observe(self, observer: GradientObserver | None) -> None:
        """Call `observer` before every update with the unit and its reduced gradient."""
        self._rank.observer = observer

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """One optimizer update.

        Args:
            batch: this replica's `num_micro_batches * micro_batch_size` samples, batch dimension
                first; a rank that loads nothing (`loads_batch` is false) may get an empty mapping.

        Raises:
            UsageError: a key is missing, or a tensor has another size than the plan's; or the plan
                is one of an evaluation.
            RunError: a transfer failed, a peer was lost, or a deadline passed; or the executor
                is closed or was stopped by an error in the middle of an earlier step.
        """
        if self.plan.schedule is Schedule.FORWARD:
            raise UsageError("the plan trains nothing: it only evaluates", hint="call evaluate()")
        result = self._run(self._rank.training, batch)
        self._rank.step += 1
        if self.plan.options.save:
            self._rank.host.complete(self._rank.step)
        return result

    def evaluate(self, batch: Mapping[str, Tensor]) -> StepResult:
        """The losses of a batch without an update: modules are in evaluation mode meanwhile.

        Args:
            batch: as for `step`.

        Raises:
            UsageError: as for `step`, or the plan has no programs for evaluation.
            RunError: as for `step`.
        """
        if not self.plan.evaluation and self.plan.schedule is not Schedule.FORWARD:
            raise UsageError(
                "the plan has no programs for evaluation", hint="plan again with lga-plan"
            )
        with _evaluation_mode(self._model):
            return self._run(self._rank.evaluation, batch)

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

    def _run(self, program: Program, batch: Mapping[str, Tensor]) -> StepResult:
        if self._broken:
            raise RunError(
                f"this executor {self._broken}, so it cannot go on",
                hint="build a new Executor",
            )
        if self.loads_batch:
            check_batch(self.plan, batch)
        what = "an evaluation" if program.is_evaluation else "a step"
        self._broken = f"was stopped in the middle of {what}"
        events = self._run_program(program, batch)
        self._broken = ""
        rank = self._rank
        return StepResult(
            losses=tuple(rank.losses[m] for m in sorted(rank.losses)),
            timeline=Timeline(source="measured", events=tuple(events)),
            finite=None if rank.finite is None else bool(rank.finite),
            gradient_norm=None if rank.gradient_norm is None else float(rank.gradient_norm),
        )

    def _run_program(self, program: Program, batch: Mapping[str, Tensor]) -> list[Event]:
        rank = self._rank
        rank.begin(program, batch)
        events = []
        origin = time.perf_counter()
        for index, instruction in enumerate(program.instructions):
            rank.index = index
            rank.buffers.settle(instruction)
            start = time.perf_counter()
            HANDLERS[instruction.opcode](rank, instruction)
            for name in program.dying.get(index, ()):
                rank.drop(name)
            end = time.perf_counter()
            events.append(
                Event(
                    rank=rank.rank,
                    index=index,
                    start_seconds=start - origin,
                    end_seconds=end - origin,
                )
            )
        rank.buffers.finish()
        rank.sends.wait()
        rank.batch = {}
        return events

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters of this rank's stages and buffers of their modules, by name.

        As in the model's own state_dict, buffers that are made anew are not part of it.
        Where weights are partitioned this is a collective over the replicas.
        """
        found: dict[str, Tensor] = {}
        for state in self._rank.units.values():
            flat = shard = self._shard(state) if state.gathered else state.whole
            if state.gathered and state.partitioned:
                flat = shard.new_empty(state.padded_length)
                what = f"state of unit {state.unit.name}"
                self._rank.transport.gather(shard, flat, what).wait()
            found.update({name: view.clone() for name, view in state.views(flat)})
        saved = self._model.state_dict().keys()
        return found | {name: value for name, value in self.buffers().items() if name in saved}

    def _shard(self, state: UnitState) -> Tensor:
        """On the device, wherever it lives."""
        if "shard" not in self.plan.offloaded:
            return state.shard
        shard, pending = self._rank.host.fetch(f"host:shard:{state.unit.name}")
        pending.wait()
        assert isinstance(shard, Tensor)
        return shard

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers of the modules in this rank's stages, by name."""
        paths = {s.path for stage in self._rank.stages.values() for s in stage.plan.code if s.path}
        return {
            name: buffer.clone()
            for path in sorted(paths)
            for name, buffer in self._model.get_submodule(path).named_buffers(prefix=path)
        }

    def resident_tensors(self) -> list[Tensor]:
        """Everything that stays allocated between steps."""
        return [*self._rank.resident_tensors(), *self._model.buffers()]

    def close(self) -> None:
        """End the executor's thread. The transport is closed by whoever made it."""
        self._broken = "is closed"
        self._rank.sends.close()


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Modules that were in training mode are again afterwards, each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
