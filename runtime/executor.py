"""The executor: one loop over the rank's program. It decides nothing.

Transfers, collectives and copies are started where they stand in the program and are waited for by
the first instruction that conflicts with their buffers.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planner.errors import UsageError
from planner.plan.names import kind_of
from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule
from runtime.code import LossFunction
from runtime.compile import CompileReport
from runtime.gathering import gather_objects
from runtime.handlers import HANDLERS, Action
from runtime.handlers.words import describe
from runtime.inputs import check_batch, replica_part
from runtime.loss_scale import LossScale
from runtime.loss_weights import LossWeight, LossWeights
from runtime.optimize import BuildOptimizer, BuildScheduler, default_optimizer
from runtime.program import Program
from runtime.result import StepResult
from runtime.state import RankState
from runtime.streams import Issued
from runtime.surface import TrainingState
from runtime.transport import Transport
from runtime.warm_up import warm_up

__all__ = ["Executor"]


class _Line(NamedTuple):
    """An instruction, ready to run."""

    written: tuple[str, ...]
    """Buffers that something may still arrive in."""
    read: tuple[str, ...]
    """Buffers to be overwritten, whose content may still be leaving."""
    act: Action
    dying: tuple[str, ...]
    """Buffers that hold nothing any more afterwards."""
    leaving: tuple[str, ...]
    """State that is not on the device any more afterwards, and buffers in host memory that hold
    nothing any more."""


class Executor(TrainingState):
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
        loss_weight: LossWeight | None = None,
        device: torch.device | str = "cpu",
        offload_folder: Path | None = None,
        compile_backend: str | None = None,
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
            loss_weight: as in the model file; every micro-batch weighs the same by default.
            device: where this rank computes.
            offload_folder: where what the plan offloads is in files, instead of in host memory.
            compile_backend: compile layers and the loss with this backend of torch.compile, now for
                steps and before the first evaluation for evaluations: collectives of all ranks.

        Raises:
            UsageError: the optimizer cannot work on a partitioned state, no file can be made in
                the folder, or the backend is unknown or lacks its tools.
            PlanFileError: the plan's code names something that the model does not have, or its
                buffers do not fit the model's parameters.
        """
        rank = RankState(
            plan,
            model.train(),
            transport,
            world_rank,
            loss_fn,
            build_optimizer,
            build_scheduler,
            torch.device(device),
            offload_folder,
            compile_backend,
        )
        super().__init__(plan, model, rank)
        ends_loss = any("loss" in stage.plan.outputs for stage in rank.stages.values())
        if loss_weight is not None and ends_loss:
            rank.loss_weights = LossWeights(plan, transport, loss_weight)
        self.device = self._rank.device
        self.rank, self.replica = self._rank.rank, self._rank.replica
        self.world_rank = world_rank
        programs = (self._rank.training, self._rank.evaluation)
        loads = (i.opcode is Opcode.LOAD for p in programs for i in p.instructions)
        self.loads_batch = any(loads) or rank.loss_weights is not None
        self._lines = {program: tuple(_lines(self._rank, program)) for program in programs}
        self.compile_report: CompileReport | None = None
        """What of all ranks was compiled, and what runs eagerly; None where nothing should be."""
        self._is_evaluation_compiled = False
        if rank.compiler is not None and plan.schedule is not Schedule.FORWARD:
            self.compile_report = warm_up(rank, rank.compiler, world_rank, training=True)

    @property
    def loss_scale(self) -> LossScale | None:
        """What the next step multiplies the loss by (a copy); None but in float16."""
        return copy.copy(self._rank.loss_scale)

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """One optimizer update.

        Args:
            batch: this replica's `num_micro_batches * micro_batch_size` samples, batch dimension
                first, or those of all replicas, of which it takes its own; a rank that loads
                nothing (`loads_batch` is false) may get an empty mapping.

        Raises:
            UsageError: a key is missing, or a tensor has another size than the plan's; or the plan
                is one of an evaluation, or `eval` was called last.
            RunError: a transfer failed, a peer was lost, or a deadline passed; or the executor
                is closed or was stopped by an error in the middle of an earlier step.
        """
        if self.plan.schedule is Schedule.FORWARD:
            raise UsageError("the plan trains nothing: it only evaluates", hint="call evaluate()")
        if not self.training:
            raise UsageError("eval() was called, and a step trains", hint="call train() first")
        for function in self._before_step.functions:
            function(batch)
        result = self._run(self._rank.training, batch, self.learning_rate)
        rank = self._rank
        rank.step += 1
        if rank.loss_scale is not None:
            rank.loss_scale.follow(finite=result.finite is not False)
        if self.plan.options.save:
            rank.host.complete(rank.step, self.loss_scale)
        for watch in self._after_step.functions:
            watch(result)
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
            self._compile_evaluation()
            return self._run(self._rank.evaluation, batch)

    def _compile_evaluation(self) -> None:
        """Before the first, and say what runs eagerly that was not said before."""
        rank = self._rank
        if rank.compiler is None or self._is_evaluation_compiled:
            return
        self._check_usable()
        said, self._is_evaluation_compiled = self.compile_report, True
        self.compile_report = warm_up(rank, rank.compiler, self.world_rank, training=False)
        if self.world_rank == 0:
            for line in self.compile_report.explain(known=said.eager if said else ()):
                warnings.warn(line, stacklevel=3)

    def _run(
        self, program: Program, batch: Mapping[str, Tensor], rate: float | None = None
    ) -> StepResult:
        self._check_usable()
        if self.loads_batch:
            batch = replica_part(self.plan, self.replica, batch)
            check_batch(self.plan, batch)
        what = "an evaluation" if program.is_evaluation else "a step"
        self._broken = f"was stopped in the middle of {what}"
        rank = self._rank
        weights = rank.loss_weights
        if weights is not None:
            weights.begin(batch, rank.device, is_evaluation=program.is_evaluation)
        moments = self._run_program(program, batch)
        self._broken = ""
        finite = None if rank.is_finite is None else bool(rank.is_finite())
        return StepResult(
            losses=tuple(rank.losses[m] for m in sorted(rank.losses)),
            rank=rank.rank,
            measured=rank.streams.moments(moments),
            finite=finite,
            not_finite=self._not_finite() if finite is False else {},
            norm=rank.gradient_norm,
            weights=weights.of_micro_batches if weights is not None else (),
            learning_rate=rate,
        )

    def _not_finite(self) -> dict[str, tuple[int, ...]]:
        """What all ranks found: a collective, after a step that updated nothing."""
        rank, found = self._rank, dict[str, tuple[int, ...]]()
        what = "the parameters whose gradients are not finite"
        mine, num_ranks = rank.not_finite, self.plan.world_size
        of_ranks = gather_objects(
            rank.transport, mine, self.world_rank, num_ranks, rank.device, what
        )
        for number, names in enumerate(of_ranks):
            found |= {name: (*found.get(name, ()), number) for name in names}
        return found

    def _run_program(self, program: Program, batch: Mapping[str, Tensor]) -> list[Any]:
        rank, buffers, clock = self._rank, self._rank.buffers, self._rank.streams.moment
        rank.begin(program, batch)
        moments = [clock()]
        for index, (written, read, act, dying, leaving) in enumerate(self._lines[program]):
            rank.index = index
            if written or read:
                buffers.settle(written, read)
            moments.append(clock())
            act()
            if dying:
                buffers.drop(dying)
            for name in leaving:
                rank.drop(name)
            moments.append(clock())
        buffers.finish()
        rank.sends.wait()
        rank.end()
        return moments

    def close(self) -> None:
        """End the executor's threads. The transport is closed by whoever made it."""
        self._broken = "is closed"
        self._rank.sends.close()
        self._rank.host_updates.close()


def _lines(rank: RankState, program: Program) -> Iterator[_Line]:
    """What is the same in every step is looked up here, once."""
    for index, instruction in enumerate(program.instructions):
        rank.begin(program, {}, index)
        act = HANDLERS[instruction.opcode](rank, instruction)
        started = partial(rank.started, instruction)
        act = rank.streams.ready(Issued(index, instruction, started, describe(instruction)), act)
        names = program.dying.get(index, ())
        leaving = tuple(name for name in names if kind_of(name) in ("shard", "moments", "host"))
        dying = tuple(name for name in names if name not in leaving)
        yield _Line(*program.conflicts[index], act, dying, leaving)


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
