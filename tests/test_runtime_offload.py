"""What is in host memory is not on the device: measured, not only planned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import own
from planned import Chain, Layer, assert_same, model_of, plan_of
from stepping import on_every_rank
from torch import Tensor, nn

from planner.errors import PlanFileError
from planner.plan.names import buffer_key, stream_of
from planner.plan.types import Buffer, Instruction, Opcode, Plan
from planner.schedules import Schedule
from runtime.executor import Executor
from runtime.local import LocalHub, LocalTransport
from runtime.memory import peak_memory

WIDTH, NUM_ROWS = 64, 256


def rows(batch_size: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, NUM_ROWS, WIDTH), "y": torch.randn(batch_size, 1)}


def mean_square(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return (output.mean((1, 2)) - batch["y"].mean(1)).square().mean()


class Wide(nn.Module):
    """Layers whose inputs or weights are large, as one likes."""

    def __init__(self, layer: Layer, num_layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer() for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def on_one_rank(made: Plan, model_file: Any, function: Callable[[Executor], Any]) -> Any:
    return on_every_rank(made, model_file, function)[0]


def peak_bytes(made: Plan, model_file: Any) -> int:
    """Of the second step: the optimizer's state is there by then."""
    batch = model_file.example_batch(made.replica_batch_size)

    def run(executor: Executor) -> int:
        executor.step(batch)
        with peak_memory(executor.resident_tensors(), executor.device) as peak:
            executor.step(batch)
        return peak.num_bytes

    found = on_one_rank(made, model_file, run)
    assert isinstance(found, int)
    return found


def test_offloaded_state_is_on_the_device_only_while_it_is_used() -> None:
    model_file = model_of(lambda: Wide(lambda: nn.Linear(WIDTH, WIDTH)), mean_square, rows)
    stages = tuple(range(9))
    choices: dict[str, Any] = {"micro_batch_size": 1, "num_micro_batches": 1, "recompute": True}
    here = plan_of(model_file, stages, **choices)
    away = plan_of(model_file, stages, offload_state=True, **choices)
    weights = 4 * sum(unit.num_elements for unit in here.units)

    def resident(executor: Executor) -> int:
        executor.step(model_file.example_batch(1))
        return sum(tensor.nbytes for tensor in executor.resident_tensors())

    assert on_one_rank(here, model_file, resident) > 3 * weights
    assert on_one_rank(away, model_file, resident) < weights  # pools of a layer or two
    saved = peak_bytes(here, model_file) - peak_bytes(away, model_file)
    assert saved > 3 * weights - 3 * 4 * weights / 8  # all but the state of a few layers


def test_state_that_is_offloaded_leaves_while_the_executor_is_built() -> None:
    """Unit by unit: the device never holds the model twice."""
    model_file = model_of(lambda: Wide(lambda: nn.Linear(WIDTH, WIDTH)), mean_square, rows)
    made = plan_of(model_file, tuple(range(9)), offload_state=True)
    model = model_file.build_model()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    transport = LocalTransport(LocalHub(made.grid, 20), 0)
    with peak_memory(model.parameters(), torch.device("cpu")) as peak:
        executor = Executor(made, model, transport, 0, loss_fn=mean_square)
    executor.close()
    assert weights <= peak.num_bytes < 1.5 * weights


@pytest.mark.parametrize("recompute", [False, True])
def test_offloaded_inputs_are_on_the_device_only_while_they_are_used(recompute: bool) -> None:
    model_file = model_of(
        lambda: Wide(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())), mean_square, rows
    )
    choices: dict[str, Any] = {
        "micro_batch_size": 1, "num_micro_batches": 4, "recompute": recompute
    }  # fmt: skip
    here = plan_of(model_file, tuple(range(9)), **choices)
    away = plan_of(model_file, tuple(range(9)), offload_inputs=True, **choices)
    tensor_bytes = 4 * NUM_ROWS * WIDTH
    stored = 7 * 4 * tensor_bytes
    saved = peak_bytes(here, model_file) - peak_bytes(away, model_file)
    assert saved > stored / 2
    assert_same(model_file, away)


class Twice(nn.Module):
    """Saves tensors of its own, a view, and a slice beside its input, output and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.one(x))
        left, right = hidden.chunk(2, -1)
        return x + self.two(torch.cat([left * right, torch.sigmoid(right)], -1)).relu()


def with_saved_in_host_memory(made: Plan) -> Plan:
    """The plan with all that stages save moved out behind FORWARD and in before BACKWARD."""

    def copy(opcode: Opcode, micro_batch: int | None, source: str, target: str) -> Instruction:
        return Instruction(
            opcode=opcode,
            stream=stream_of(opcode),
            micro_batch=micro_batch,
            reads=(source,),
            writes=(target,),
        )

    programs, tables = [], []
    for program, table in zip(made.programs, made.buffers, strict=True):
        found: list[Instruction] = []
        moved: set[str] = set()
        for instruction in program:
            m = instruction.micro_batch
            name = f"saved:{instruction.stage}.{m}"
            if instruction.opcode in (Opcode.BACKWARD, Opcode.BACKWARD_INPUT):
                found.append(copy(Opcode.FETCH, m, f"host:{name}", name))
            found.append(instruction)
            if (
                instruction.opcode in (Opcode.FORWARD, Opcode.RECOMPUTE)
                and name in instruction.writes
            ):
                found.append(copy(Opcode.EVICT, m, name, f"host:{name}"))
                found.append(copy(Opcode.RELEASE, m, name, name))
                moved.add(buffer_key(name))
        programs.append(tuple(found))
        hosts = [
            Buffer(name=f"host:{buffer.name}", dtype=buffer.dtype, shape=buffer.shape)
            for buffer in table
            if buffer.name in moved
        ]
        tables.append((*table, *hosts))
    return replace(made, programs=tuple(programs), buffers=tuple(tables))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.ZERO_BUBBLE])
def test_what_a_stage_saves_can_be_in_host_memory(schedule: Schedule, recompute: bool) -> None:
    tied = model_of(own.Tied, own.classes, own.tokens)
    wide = model_of(lambda: Wide(Twice), mean_square, rows)
    for model_file, stages in ((tied, (0, 1, 3)), (wide, (0, 4, 8))):
        made = plan_of(
            model_file,
            stages,
            num_pipeline_ranks=2,
            schedule=schedule,
            recompute=recompute,
            offload_state=True,
        )
        is_tied = any(len(unit.ranks) > 1 for unit in made.units)
        assert_same(model_file, with_saved_in_host_memory(made), 1e-6 if is_tied else 0.0)
    here = plan_of(wide, tuple(range(9)), micro_batch_size=1)
    away = with_saved_in_host_memory(here)
    stored = sum(stage.saved_bytes for stage in here.stages) * here.num_micro_batches
    assert peak_bytes(here, wide) - peak_bytes(away, wide) > stored / 2


@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_a_plan_without_releases_does_the_same(schedule: Schedule) -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    made = plan_of(
        model_file, (0, 1, 2, 3, 5), num_pipeline_ranks=2, num_replicas=2, schedule=schedule
    )
    programs = tuple(
        tuple(i for i in program if i.opcode is not Opcode.RELEASE) for program in made.programs
    )
    assert sum(map(len, programs)) < sum(map(len, made.programs))
    assert_same(model_file, replace(made, programs=programs), 1e-6)


def test_a_reduction_in_parts_adds_up() -> None:
    """Where a buffer is wanted again before its sum is complete (plain order, one buffer)."""
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    for partition in (0, 3):
        made = plan_of(
            model_file,
            (0, 2, 5),
            num_replicas=2,
            partition=partition,
            schedule=Schedule.PLAIN,
            num_gradient_buffers=1,
        )
        adding = [
            instruction
            for instruction in made.programs[0]
            if instruction.opcode is Opcode.REDUCE and len(instruction.reads) == 2
        ]
        assert bool(adding) == (partition == 3)
        assert_same(model_file, made, 1e-6)


@pytest.mark.parametrize("kind", ["shard", "moments", "sum", "weights"])
def test_a_table_that_does_not_fit_the_model_is_refused(kind: str) -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    made = plan_of(model_file, (0, 2, 5), num_replicas=2)

    def shrunk(buffer: Buffer) -> Buffer:
        if not buffer.name.startswith(f"{kind}:"):
            return buffer
        *outer, last = buffer.shape
        return replace(buffer, shape=(*outer, last - 1))

    def retyped(buffer: Buffer) -> Buffer:
        return replace(buffer, dtype="float16") if buffer.name.startswith(f"{kind}:") else buffer

    for change in (shrunk, retyped):
        table = tuple(map(change, made.buffers[0]))
        wrong = replace(made, buffers=(table,))
        with pytest.raises(PlanFileError, match=rf"buffer {kind}:\S+ of pipeline rank 0 is plan"):
            on_one_rank(wrong, model_file, lambda _: None)


def test_a_pool_may_be_larger_than_the_model_needs() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    made = plan_of(model_file, (0, 2, 5), num_replicas=2)
    table = tuple(
        replace(b, shape=(10 * b.shape[0],)) if b.name.startswith(("sum:", "weights:")) else b
        for b in made.buffers[0]
    )
    large = replace(made, buffers=(table,))
    pools = sum(math.prod(b.shape) * 4 for b in table if b.name.startswith(("sum:", "weights:")))
    held = on_one_rank(
        large, model_file, lambda executor: sum(t.nbytes for t in executor.resident_tensors())
    )
    assert held > pools
    assert_same(model_file, large, 1e-6)


def test_a_gradient_that_nothing_uses_is_refused() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    made = plan_of(model_file, (0, 2, 5))
    program = tuple(i for i in made.programs[0] if i.opcode is not Opcode.UPDATE)
    wrong = replace(made, programs=(program,))
    with pytest.raises(PlanFileError, match="no later instruction reduces it"):
        on_one_rank(wrong, model_file, lambda _: None)


def test_halves_of_a_backward_find_the_same_bits_as_the_whole() -> None:
    """Each pair of halves in place of a BACKWARD, in a plan that is otherwise the same."""
    model_file = model_of(lambda: Wide(Twice), mean_square, rows)
    made = plan_of(model_file, (0, 2, 4, 6, 8), num_pipeline_ranks=2)

    def halves(instruction: Instruction) -> tuple[Instruction, ...]:
        if instruction.opcode is not Opcode.BACKWARD:
            return (instruction,)
        passed = instruction.writes
        first = tuple(name for name in passed if name.startswith("gradient:"))
        second = tuple(name for name in passed if not name.startswith("gradient:"))
        return (
            replace(instruction, opcode=Opcode.BACKWARD_INPUT, writes=first),
            replace(instruction, opcode=Opcode.BACKWARD_WEIGHT, writes=second),
        )

    programs = tuple(
        tuple(half for instruction in program for half in halves(instruction))
        for program in made.programs
    )
    assert_same(model_file, replace(made, programs=programs))
