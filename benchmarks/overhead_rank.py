"""One rank of the overhead benchmark: our runtime, torch's, and the same work by hand, in turns.

Run by `benchmarks/overhead.py`, which says what is measured.
"""

import copy
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
)

from planner.model_file import ModelFile, model_from_functions
from planner.plan.file import read_plan
from planner.plan.types import Instruction, Opcode, Plan
from runtime.build import build_model, make_executor
from runtime.session import distributed_session
from runtime.transfer import DistributedTransport
from runtime.transport import Transport

__all__ = ["CONTESTANTS", "NUM_LAYERS", "Case", "model_of_width"]

CONTESTANTS = ("ours", "torch", "by hand")
NUM_LAYERS = 8
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The same schedule in both runtimes."""

    plan: Plan
    torch_schedule: str
    """Class of torch.distributed.pipelining."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way of taking a step of a case on this rank."""

    step: Callable[[], object]
    num_actions: int
    """By its own count: instructions of the program, or entries of torch's schedule."""
    losses: Callable[[], list[Tensor]]
    """Of the last step; none on ranks without the last stage."""


class Chain(nn.Module):
    """Equal linear layers, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model_of_width(width: int) -> ModelFile:
    """The model file that both runtimes train."""

    def batch(batch_size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, width), "y": torch.randn(batch_size, width)}

    chain = model_from_functions(
        lambda: Chain(width),
        batch,
        loss_fn=lambda output, given: _loss(output, given["y"]),
        name="chain",
    )
    return replace(chain, build_optimizer=_optimizer)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def _optimizer(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)  # type: ignore[arg-type]


def ours(
    case: Case, model_file: ModelFile, transport: Transport, rank: int, batch: Mapping[str, Tensor]
) -> Contestant:
    """Our executor on the plan."""
    executor = make_executor(case.plan, model_file, transport, rank, CPU)
    losses: list[Tensor] = []

    def step() -> None:
        losses[:] = executor.step(batch).losses

    return Contestant(
        step=step, num_actions=len(case.plan.programs[rank]), losses=lambda: list(losses)
    )


def torchs(
    case: Case, layers: Mapping[int, nn.Module], rank: int, batch: Mapping[str, Tensor]
) -> Contestant:
    """torch.distributed.pipelining on the same stages, with one optimizer for the rank."""
    plan = case.plan
    modules = copy.deepcopy(layers)
    stages = [PipelineStage(m, index, plan.num_stages, CPU) for index, m in modules.items()]
    schedule = _schedule(case, stages)
    optimizer = _optimizer([p for module in modules.values() for p in module.parameters()])
    has_first, has_last = 0 in modules, plan.num_stages - 1 in modules
    arguments = (batch["x"],) if has_first else ()
    target = batch["y"] if has_last else None
    losses: list[Tensor] = []

    def step() -> None:
        losses.clear()
        optimizer.zero_grad()
        schedule.step(
            *arguments,
            target=target,
            losses=losses if has_last else None,
            return_outputs=False,
        )
        optimizer.step()

    if isinstance(schedule, _PipelineScheduleRuntime):
        own = schedule.pipeline_order_with_comms[rank]
        num_actions = sum(action is not None for action in own)
    else:
        num_actions = sum(_of_pipeline(i.opcode) for i in plan.programs[rank])
    return Contestant(step=step, num_actions=num_actions, losses=lambda: list(losses))


def _schedule(case: Case, stages: list[PipelineStage]) -> _PipelineSchedule:
    made: Any = getattr(pipelining, case.torch_schedule)
    of_rank = stages[0] if issubclass(made, PipelineScheduleSingle) else stages
    schedule: _PipelineSchedule = made(of_rank, case.plan.num_micro_batches, loss_fn=_loss)
    return schedule


def by_hand(
    case: Case, layers: Mapping[int, nn.Module], rank: int, batch: Mapping[str, Tensor]
) -> Contestant:
    """The plan's kernels and messages in its order, written out: what no runtime can do without."""
    modules = copy.deepcopy(layers)
    optimizer = _optimizer([p for module in modules.values() for p in module.parameters()])
    line = StraightLine(case.plan, modules, rank, batch)

    def step() -> None:
        line.run()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step=step, num_actions=0, losses=lambda: list(line.losses))


class StraightLine:
    """One step of a chain as a list of calls, each of which does one thing."""

    def __init__(
        self, plan: Plan, modules: Mapping[int, nn.Module], rank: int, batch: Mapping[str, Tensor]
    ) -> None:
        self.losses: list[Tensor] = []
        self._values: dict[str, Tensor] = {}
        self._graphs: dict[str, tuple[Tensor, Tensor]] = {}
        self._arriving: dict[str, dist.Work | None] = {}
        self._leaving: list[dist.Work | None] = []
        self._plan, self._modules = plan, modules
        self._rows = torch.split(batch["x"], plan.micro_batch_size)
        self._targets = torch.split(batch["y"], plan.micro_batch_size)
        self._share = torch.ones(()) / plan.num_micro_batches
        self._calls = [self._call(i) for i in plan.programs[rank] if _of_pipeline(i.opcode)]

    def run(self) -> None:
        self.losses.clear()
        for call in self._calls:
            call()
        for work in self._leaving:
            assert work is not None
            work.wait()
        self._leaving.clear()
        self._values.clear()

    def _call(self, instruction: Instruction) -> Callable[[], None]:
        peer, rows = instruction.peer, self._rows[0]
        if instruction.opcode is Opcode.SEND:
            (sent,) = instruction.reads
            return lambda: self._leaving.append(dist.isend(self._values[sent], peer))
        if instruction.opcode is Opcode.FORWARD:
            return self._forward(instruction)
        if instruction.opcode is Opcode.BACKWARD:
            return self._backward(instruction)
        (received,) = instruction.writes

        def receive() -> None:
            self._values[received] = room = torch.empty_like(rows)
            self._arriving[received] = dist.irecv(room, peer)

        return receive

    def _value(self, name: str) -> Tensor:
        work = self._arriving.pop(name, None)
        if work is not None:
            work.wait()
        return self._values[name]

    def _forward(self, instruction: Instruction) -> Callable[[], None]:
        stage, micro_batch, graph, source, target = self._names(instruction)
        module = self._modules[stage]

        def forward() -> None:
            if stage == 0:
                entered = self._rows[micro_batch]
            else:
                entered = self._value(source).detach().requires_grad_()
            output = module(entered)
            if stage == self._plan.num_stages - 1:
                output = _loss(output, self._targets[micro_batch])
                self.losses.append(output.detach())
            else:
                self._values[target] = output.detach()
            self._graphs[graph] = entered, output

        return forward

    def _backward(self, instruction: Instruction) -> Callable[[], None]:
        stage, _, graph, source, target = self._names(instruction)
        is_last = stage == self._plan.num_stages - 1

        def backward() -> None:
            entered, output = self._graphs.pop(graph)
            gradient = self._share if is_last else self._value(f"gradient:{target}")
            torch.autograd.backward(output, gradient)
            if entered.grad is not None:
                self._values[f"gradient:{source}"] = entered.grad

        return backward

    def _names(self, instruction: Instruction) -> tuple[int, int, str, str, str]:
        """Stage, micro-batch, and names of its graph, input and output."""
        assert instruction.stage is not None
        assert instruction.micro_batch is not None
        plan, micro_batch = self._plan.stages[instruction.stage], instruction.micro_batch
        (target,), source = plan.outputs, plan.inputs[0] if plan.inputs else ""
        graph = f"{plan.index}.{micro_batch}"
        return plan.index, micro_batch, graph, f"{source}.{micro_batch}", f"{target}.{micro_batch}"


def _of_pipeline(opcode: Opcode) -> bool:
    return opcode in (Opcode.FORWARD, Opcode.BACKWARD, Opcode.SEND, Opcode.RECEIVE)


def contestants(
    case: Case, model_file: ModelFile, transport: Transport, rank: int
) -> dict[str, Contestant]:
    """All of a case, on equal weights and the same batch."""
    torch.manual_seed(0)
    assert model_file.example_batch is not None
    batch = model_file.example_batch(case.plan.replica_batch_size)
    model = build_model(model_file, case.plan.options.seed, CPU)
    layers = {
        stage.index: nn.Sequential(*(model.get_submodule(name) for name in stage.layers))
        for stage in case.plan.stages
        if stage.rank == rank
    }
    return {
        "ours": ours(case, model_file, transport, rank, batch),
        "torch": torchs(case, layers, rank, batch),
        "by hand": by_hand(case, layers, rank, batch),
    }


def seconds_of(step: Callable[[], object], num_steps: int) -> float:
    """CPU seconds of a step, in all threads that Python runs; gloo's own carry the messages."""
    dist.barrier()
    start = _python_seconds()
    for _ in range(num_steps):
        step()
    return (_python_seconds() - start) / num_steps


def _python_seconds() -> float:
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.ident]
    return sum(time.clock_gettime(clock) for clock in clocks)


def measure(
    cases: list[Case], model_file: ModelFile, transports: list[Transport], rank: int,
    num_rounds: int, num_steps: int,
) -> list[dict[str, object]]:  # fmt: skip
    """By case: what each contestant took in each round, and how many actions it counts."""
    made = [
        contestants(case, model_file, transport, rank)
        for case, transport in zip(cases, transports, strict=True)
    ]
    for case in made:
        losses = {}
        for name, contestant in case.items():
            contestant.step()
            losses[name] = contestant.losses()
        for of_all in zip(*losses.values(), strict=True):
            for loss in of_all[1:]:
                torch.testing.assert_close(of_all[0], loss)
        for contestant in case.values():
            seconds_of(contestant.step, 2)
    gc.collect()
    gc.freeze()  # what the imports left is not scanned again and again, in whoever's turn
    found: list[dict[str, list[float]]] = [{name: [] for name in case} for case in made]
    for _ in range(num_rounds):
        for case, figures in zip(made, found, strict=True):
            for name, contestant in case.items():
                figures[name].append(seconds_of(contestant.step, num_steps))
    return [
        {"seconds": figures, "num_actions": {name: c.num_actions for name, c in case.items()}}
        for case, figures in zip(made, found, strict=True)
    ]


def main(folder: Path, width: int, num_rounds: int, num_steps: int) -> None:
    """Measure the cases in `folder` and leave the figures there."""
    torch.set_num_threads(1)
    names: list[str] = json.loads((folder / "schedules").read_text())
    cases = [
        Case(plan=read_plan(folder / f"{index}.plan.yaml"), torch_schedule=name)
        for index, name in enumerate(names)
    ]
    first, *others = cases
    with distributed_session(first.plan, CPU) as (transport, rank):
        more = [DistributedTransport(case.plan, rank, CPU) for case in others]
        model_file = model_of_width(width)
        found = measure(cases, model_file, [transport, *more], rank, num_rounds, num_steps)
        (folder / f"figures.{rank}").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
