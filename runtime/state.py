"""Everything one rank holds while it runs a plan: parameters, buffers, stages, optimizers."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.compute_type import to_compute_type
from planner.plan.names import kind_of
from planner.plan.types import Instruction, Opcode, Plan
from planner.precision import Precision
from planner.schedules import Schedule
from runtime.buffers import Buffers, DeviceSends, Sends
from runtime.code import LossFunction
from runtime.compile import Compiler, reasons_to_run_eagerly
from runtime.cuda import streams_of
from runtime.host import HostMemory
from runtime.host_updates import HostUpdates, check_optimizer
from runtime.loss_scale import LossScale
from runtime.loss_weights import LossWeights
from runtime.optimize import BuildOptimizer, BuildScheduler, UnitOptimizer
from runtime.program import Program
from runtime.random import KeyedRandom
from runtime.shards import UnitState
from runtime.sizes import check_table, make_pools
from runtime.stage import Stage, modules_of
from runtime.streams import Figure
from runtime.sums import GradientSums
from runtime.transport import Pending, Transport
from runtime.weights import WeightBuffers

__all__ = ["GradientObserver", "RankState"]

GradientObserver = Callable[[UnitState, Tensor], None]
"""Called before each update with the unit and this rank's part of its whole gradient, unclipped."""


class RankState:
    """The memory of one rank. The handlers work on it; nothing else does."""

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        transport: Transport,
        world_rank: int,
        loss_fn: LossFunction | None,
        build_optimizer: BuildOptimizer,
        build_scheduler: BuildScheduler | None,
        device: torch.device,
        offload_folder: Path | None = None,
        compile_backend: str | None = None,
    ) -> None:
        self.plan, self.transport, self.device = plan, transport, device
        self.rank, self.replica = plan.coordinates(world_rank)
        self.streams = streams_of(plan, world_rank, device)
        self.training, self.evaluation = _programs(
            plan, self.rank, loads_beside=self.streams.is_asynchronous
        )
        self.random = KeyedRandom(plan.options.seed)
        self.buffers = Buffers()
        self.sends = DeviceSends() if self.streams.is_asynchronous else Sends()
        self.host = HostMemory(self.streams, offload_folder)
        self.step = 0
        is_scaled = plan.options.precision is Precision.FLOAT16
        self.loss_scale = LossScale() if is_scaled else None
        self.observer: GradientObserver | None = None
        self.loss_weights: LossWeights | None = None
        """Where the loss is computed, if the user weighs micro-batches."""
        if plan.options.clip_delayed:
            self.buffers["clip:scale"] = torch.ones((), device=device)
        self.begin(self.training, {})
        mine = [stage for stage in plan.stages if stage.rank == self.rank]
        names = {name for stage in mine for name in stage.units}
        self.host_updates = HostUpdates(plan.options.deadline_seconds)
        self.units: dict[str, UnitState] = {}
        self.optimizers: dict[str, UnitOptimizer] = {}
        for unit in plan.units:
            if unit.name in names:
                self._take(
                    UnitState(unit, plan, model, self.replica), build_optimizer, build_scheduler
                )
        if plan.options.update_on_host:
            for optimizer in self.optimizers.values():
                check_optimizer(optimizer)
        programs = (self.training, self.evaluation)
        check_table(plan, self.rank, self.units, programs)
        self._forget_others(model)
        held = {id(p) for state in self.units.values() for p in state.parameters.values()}
        options = plan.options
        to_compute_type(model, options.precision, options.keep_float32, done=held)
        pools = {}
        if plan.gathers:
            pools = make_pools(plan, self.rank, "weights", self.units, programs, device)
        self.weights = WeightBuffers(pools, self.units)
        self.sums = GradientSums(make_pools(plan, self.rank, "sum", self.units, programs, device))
        self.compiler: Compiler | None = None
        if compile_backend is not None:
            places = {k: v for s in self.units.values() for k, v in s.places_bytes().items()}
            self.compiler = Compiler(compile_backend, device, places)
        self.eager_stages = reasons_to_run_eagerly(plan, self.rank)
        """Stages that are not compiled in any case, and why."""
        self.stages = self._make_stages(model, loss_fn)
        self.specs = {spec.name: spec for spec in plan.tensors}
        self.num_losses = plan.num_micro_batches * plan.num_replicas
        self._root: Tensor | None = None

    def begin(self, program: Program, batch: Mapping[str, Tensor], index: int = 0) -> None:
        """A step or an evaluation starts, or one of its instructions is made ready."""
        self.program, self.batch = program, batch
        self._samples: dict[str, tuple[Tensor, ...]] = {}
        """By batch key: the parts of the micro-batches."""
        self.index = index
        """Of the instruction that runs."""
        self.losses: dict[int, Tensor] = {}
        self.is_finite: Figure | None = None
        """Whether all gradients are, where the program checks it and has come so far."""
        self.not_finite: list[str] = []
        """Parameters of this rank that CHECK_FINITE found a bad gradient of."""
        self.gradient_norm: Figure | None = None

    def end(self) -> None:
        """The step or the evaluation is over: its batch is let go."""
        self.batch, self._samples = {}, {}

    def samples(self, key: str, micro_batch: int) -> Tensor:
        """A micro-batch's part of the batch."""
        if key not in self._samples:
            size, whole = self.plan.micro_batch_size, self.batch[key]
            # Not split(): torch forbids the model to change what that gives, in words of its own.
            self._samples[key] = tuple(
                whole.narrow(0, first, size) for first in range(0, len(whole), size)
            )
        return self._samples[key][micro_batch]

    def started(self, instruction: Instruction) -> Iterable[Pending]:
        """What the instruction that has just run has started."""
        if instruction.opcode is Opcode.SEND and isinstance(self.sends, DeviceSends):
            return (self.sends.newest,)
        return self.buffers.arriving(instruction.writes)

    def unit(self, instruction: Instruction) -> UnitState:
        assert instruction.unit is not None
        return self.units[instruction.unit]

    def stage(self, instruction: Instruction) -> Stage:
        assert instruction.stage is not None
        return self.stages[instruction.stage]

    def sum_of(self, state: UnitState) -> str:
        """The accumulation buffer that the running instruction uses for a unit; else empty."""
        sums = self.program.sums.get(self.index, {})
        return next((name for name, unit in sums.items() if unit == state.unit.name), "")

    def total(self, state: UnitState) -> Tensor:
        """The accumulated gradient of a unit, where the running instruction adds it up."""
        return self.sums.total(state, self.sum_of(state))

    def gradients(self, instruction: Instruction) -> list[tuple[UnitState, Tensor]]:
        """Units whose whole gradient the running instruction reads, and this rank's part of it."""
        sums = self.program.sums.get(self.index, {})
        found = []
        for name in instruction.reads:
            if kind_of(name) == "sum":
                state = self.units[sums[name]]
                found.append((state, self.sums.total(state, name)))
            elif kind_of(name) == "reduced":
                found.append((self.units[name.partition(":")[2]], self.buffers[name]))
        return found

    def gradient_of_loss(self, loss: Tensor, micro_batch: int) -> Tensor:
        """What backward starts from: the step's loss is the mean of all micro-batches'."""
        if self.loss_weights is not None:
            root = self.loss_weights.root(loss, micro_batch)
        else:
            root = self._mean_root(loss)
        return root if self.loss_scale is None else root * self.loss_scale.scale

    def _mean_root(self, loss: Tensor) -> Tensor:
        root = self._root
        if root is None or root.dtype != loss.dtype or root.shape != loss.shape:
            self._root = root = torch.ones_like(loss) / self.num_losses
        return root

    def value(self, name: str) -> Any:
        """What a buffer on the device holds, to be copied: tensors, or dicts and lists of them."""
        kind, _, unit = name.partition(":")
        match kind:
            case "shard":
                return self.units[unit].shard
            case "moments":
                return self.optimizers[unit].moments if unit in self.optimizers else {}
            case "saved":
                saved = self.buffers[name]
                return {"graph": saved, "tensors": saved.tensors.tensors()}
        return self.buffers[name]

    def put(self, name: str, value: Any) -> None:
        """Set a buffer on the device to what `value` gave."""
        kind, _, unit = name.partition(":")
        match kind:
            case "shard":
                self.units[unit].put_shard(value)
            case "moments":
                if unit in self.optimizers:
                    self.optimizers[unit].put_moments(value)
            case "saved":
                value["graph"].tensors.put(value["tensors"])
                self.buffers[name] = value["graph"]
            case _:
                self.buffers[name] = value

    def drop(self, name: str) -> None:
        """Let go of what a buffer holds, if anything."""
        match kind_of(name):
            case "shard":
                self.put(name, None)
            case "moments":
                self.put(name, {})
            case "host":
                self.host.drop(name)
            case _:
                self.buffers.drop([name])

    def resident_tensors(self) -> list[Tensor]:
        """What stays allocated on the device between steps."""
        found = [tensor for state in self.units.values() for tensor in state.resident_tensors]
        found += [*self.weights.tensors.values(), *self.sums.tensors.values()]
        found += [self.buffers["clip:scale"]] if self.plan.options.clip_delayed else []
        return found + [t for optimizer in self.optimizers.values() for t in optimizer.tensors()]

    def _take(
        self,
        state: UnitState,
        build_optimizer: BuildOptimizer,
        build_scheduler: BuildScheduler | None,
    ) -> None:
        """What is gathered or offloaded leaves at once: the device need not hold all of it twice.

        Every step finds in host memory what the plan offloads.
        """
        unit = state.unit.name
        self.units[unit] = state
        if state.unit.trainable:
            self.optimizers[unit] = UnitOptimizer(state, build_optimizer, build_scheduler)
        if self.plan.gathers:
            state.detach_weights()
        for name in (f"{kind}:{unit}" for kind in self.plan.offloaded):
            self.host.keep(f"host:{name}", self.value(name)).wait()
            self.drop(name)

    def _make_stages(
        self, model: torch.nn.Module, loss_fn: LossFunction | None
    ) -> dict[int, Stage]:
        plan = self.plan
        callers = Counter(key for stage in plan.stages for key in modules_of(stage, model))
        shared_modules = frozenset(key for key, number in callers.items() if number > 1)
        gradient_tensors = frozenset(t.name for t in plan.tensors if t.requires_grad)
        return {
            stage.index: Stage(
                stage,
                gradient_tensors,
                model,
                loss_fn,
                self.device,
                self.random,
                shared_modules,
                None if stage.index in self.eager_stages else self.compiler,
            )
            for stage in plan.stages
            if stage.rank == self.rank
        }

    def _forget_others(self, model: torch.nn.Module) -> None:
        """Parameters of other ranks hold no memory."""
        held = {id(p) for state in self.units.values() for p in state.parameters.values()}
        for parameter in model.parameters():
            if id(parameter) not in held:
                parameter.data = parameter.data.new_empty(0)


def _programs(plan: Plan, rank: int, *, loads_beside: bool) -> tuple[Program, Program]:
    """Of a step and of an evaluation; empty where the plan has none."""
    only_evaluates = plan.schedule is Schedule.FORWARD
    training = () if only_evaluates else plan.programs[rank]
    programs = plan.programs if only_evaluates else plan.evaluation
    evaluation = programs[rank] if programs else ()
    given: Any = {"offloaded": plan.offloaded, "loads_beside": loads_beside}
    return (
        Program(training, is_evaluation=False, **given),
        Program(evaluation, is_evaluation=True, **given),
    )
