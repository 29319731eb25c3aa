"""The executor: one loop over the rank's program. It decides nothing.

Transfers and collectives are started where they stand in the program and are waited for by the
first instruction that conflicts with their buffers.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import RunError, UsageError
from planner.plan.types import Opcode, Plan
from planner.timeline import Event, Timeline
from runtime.code import LossFunction
from runtime.handlers import HANDLERS
from runtime.optimize import BuildOptimizer, BuildScheduler, default_optimizer
from runtime.state import GradientObserver, RankState
from runtime.transport import Traffic, Transport

__all__ = ["Executor", "StepResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One step on one rank."""

    losses: tuple[Tensor, ...]
    """Loss of each micro-batch of this replica; empty on ranks without the last stage."""
    timeline: Timeline
    """Measured, in this rank's clock from the start of the step."""

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
            PlanFileError: the plan's code names something that the model does not have.
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
        self.loads_batch = any(i.opcode is Opcode.LOAD for i in self._rank.program)

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
            UsageError: a key is missing, or a tensor has another size than the plan's.
            RunError: a transfer failed, a peer was lost, or a deadline passed; or the executor
                is closed or was stopped by an error in the middle of an earlier step.
        """
        if self._broken:
            raise RunError(
                f"this executor {self._broken}, so it cannot take another step",
                hint="build a new Executor",
            )
        if self.loads_batch:
            self._check_batch(batch)
        self._broken = "was stopped in the middle of a step"
        result = self._run_program(batch)
        self._broken = ""
        return result

    def _run_program(self, batch: Mapping[str, Tensor]) -> StepResult:
        rank = self._rank
        rank.batch, rank.losses = batch, {}
        events = []
        origin = time.perf_counter()
        for index, instruction in enumerate(rank.program):
            rank.buffers.settle(instruction)
            start = time.perf_counter()
            HANDLERS[instruction.opcode](rank, instruction)
            rank.buffers.drop_after(index)
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
        rank.step += 1
        rank.batch = {}
        return StepResult(
            losses=tuple(rank.losses[m] for m in sorted(rank.losses)),
            timeline=Timeline(source="measured", events=tuple(events)),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters of this rank's stages and buffers of their modules, by name.

        As in the model's own state_dict, buffers that are made anew are not part of it.
        With a partitioned state this is a collective over the replicas.
        """
        found: dict[str, Tensor] = {}
        for state in self._rank.units.values():
            flat = state.shard
            if state.partitioned:
                flat = flat.new_empty(state.padded_length)
                what = f"state of unit {state.unit.name}"
                self._rank.transport.gather(state.shard, flat, what).wait()
            found.update({name: view.clone() for name, view in state.views(flat)})
        saved = self._model.state_dict().keys()
        return found | {name: value for name, value in self.buffers().items() if name in saved}

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

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        for spec in self.plan.batch:
            if spec.name not in batch:
                raise UsageError(
                    f"the batch has no key {spec.name!r}; it has {', '.join(sorted(batch))}",
                    hint="give every key that example_batch gives",
                )
            expected = (self.plan.replica_batch_size, *spec.shape[1:])
            if tuple(batch[spec.name].shape) != expected:
                raise UsageError(
                    f"batch key {spec.name!r} has shape {tuple(batch[spec.name].shape)}, but the "
                    f"plan is for {expected}: {self.plan.num_micro_batches} micro-batches of "
                    f"{self.plan.micro_batch_size} samples per replica",
                    hint="give such a batch, or plan again with another --batch-size",
                )
            dtype = str(batch[spec.name].dtype).removeprefix("torch.")
            if dtype != spec.dtype:
                raise UsageError(
                    f"batch key {spec.name!r} is of {dtype}, but the plan is for {spec.dtype}",
                    hint=f"convert it, as example_batch does: batch[{spec.name!r}].to(torch."
                    f"{spec.dtype})",
                )
