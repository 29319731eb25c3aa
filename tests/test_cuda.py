"""On a real GPU: the same numbers, no synchronisation inside a step, copies beside compute.

Skipped where torch finds no GPU; `test_streams.py` has the order of things, which needs none.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planned import model_of, plan_of
from stepping import linears, plain_gradients
from test_runtime_offload import Twice, Wide, mean_square, rows
from torch import Tensor, nn

from planner.model_file import ModelFile
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from runtime.build import build_model, make_executor
from runtime.executor import Executor
from runtime.local import run_local
from runtime.optimize import default_optimizer
from runtime.run_ahead import MOST_AHEAD
from runtime.stage import modules_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no GPU on this machine"
)

WIDE = model_of(lambda: Wide(Twice, 4), mean_square, rows)
NUM_STEPS = 3
BUSY_CYCLES = 20_000_000
"""About 10 ms."""
OPTIONS = PlanOptions(deadline_seconds=60, clip_norm=1.0, check_finite=True)


def gpu() -> torch.device:
    return torch.device("cuda", 0)


def on_gpu(made: Plan, model_file: ModelFile, function: Callable[[Executor], Any]) -> list[Any]:
    """On every rank; all of them on one GPU, in threads."""

    def run(transport: Any, world_rank: int) -> Any:
        torch.cuda.set_device(gpu())
        executor = make_executor(made, model_file, transport, world_rank, gpu())
        try:
            return function(executor)
        finally:
            torch.cuda.synchronize()
            executor.close()

    return run_local(made, run)


def given(made: Plan, model_file: ModelFile, step: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + step)
    return dict(model_file.example_batch(made.global_batch_size))


def trained(made: Plan, model_file: ModelFile) -> dict[str, Tensor]:
    """What three steps leave, of replica 0."""

    def run(executor: Executor) -> dict[str, Tensor]:
        for step in range(NUM_STEPS):
            executor.step(given(made, model_file, step) if executor.loads_batch else {})
        state = executor.state_dict()  # a collective where the state is partitioned
        return state if executor.replica == 0 else {}

    found: dict[str, Tensor] = {}
    for part in on_gpu(made, model_file, run):
        found |= part
    return found


def trained_plainly(made: Plan, model_file: ModelFile) -> dict[str, Tensor]:
    """By accumulation on the GPU, without any of the runtime."""
    model = build_model(model_file, made.options.seed, gpu())
    optimizer = (model_file.build_optimizer or default_optimizer)(model.parameters())
    scheduler = model_file.build_scheduler(optimizer) if model_file.build_scheduler else None
    for step in range(NUM_STEPS):
        batch = {key: value.to(gpu()) for key, value in given(made, model_file, step).items()}
        plain_gradients(made, model_file, model, step, [batch])
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_one_rank_trains_the_bits_of_plain_accumulation(
    schedule: Schedule, is_offloaded: bool
) -> None:
    for model_file, stages in ((linears(), (0, 1, 2, 3, 5)), (WIDE, (0, 1, 2, 4))):
        made = plan_of(model_file, stages, schedule=schedule, offload_state=is_offloaded)
        mine, plain = trained(made, model_file), trained_plainly(made, model_file)
        assert mine.keys() == plain.keys()
        for name, value in mine.items():
            assert value.is_cuda
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("choices", [{"recompute": True}, {"offload_inputs": True}])
def test_stored_inputs_may_leave_or_be_computed_again(choices: dict[str, Any]) -> None:
    here = plan_of(WIDE, (0, 1, 2, 4), micro_batch_size=1)
    away = plan_of(WIDE, (0, 1, 2, 4), micro_batch_size=1, offload_state=True, **choices)
    plain = trained(here, WIDE)
    for name, value in trained(away, WIDE).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    "layout",
    [
        {"num_pipeline_ranks": 2},
        {"num_replicas": 2, "partition": 3},
        {"num_replicas": 2, "partition": 2, "offload_state": True},
    ],
)
def test_several_ranks_on_one_gpu(layout: dict[str, Any]) -> None:
    model_file = linears()
    made = plan_of(model_file, (0, 1, 2, 3, 5), **layout)
    one = plan_of(
        model_file,
        (0, 1, 2, 3, 5),
        num_micro_batches=made.num_micro_batches * made.num_replicas,
    )
    mine, plain = trained(made, model_file), trained(one, model_file)
    for name, value in mine.items():
        tolerance = 1e-5 if made.num_replicas > 1 else 0.0
        assert float((value - plain[name]).norm()) <= tolerance * float(plain[name].norm()), name


def test_nothing_in_a_step_synchronises() -> None:
    """But where the process waits for the verdict of CHECK_FINITE, by an event of its own."""
    made = plan_of(WIDE, (0, 1, 2, 4), options=OPTIONS, offload_state=True, offload_inputs=True)

    def run(executor: Executor) -> None:
        batch = given(made, WIDE, 0)
        for _ in range(2):  # which buffers a forward changes is found, pinned memory is made
            executor.step(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [executor.step(batch) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(result.finite for result in results)
        norms = [result.gradient_norm for result in results]
        assert all(norm is not None and norm > 0 for norm in norms)

    on_gpu(made, WIDE, run)


def test_pinned_memory_is_taken_once() -> None:
    made = plan_of(WIDE, (0, 1, 2, 4), offload_state=True, offload_inputs=True)

    def run(executor: Executor) -> tuple[int, int]:
        for _ in range(3):
            executor.step(given(made, WIDE, 0))
        before = torch.cuda.host_memory_stats()["num_host_alloc"]
        for _ in range(5):
            executor.step(given(made, WIDE, 0))
        return before, torch.cuda.host_memory_stats()["num_host_alloc"]

    ((before, after),) = on_gpu(made, WIDE, run)
    assert after - before <= MOST_AHEAD  # what loads stage while the process is ahead


def test_the_process_is_ahead_by_so_many_computes_and_no_more() -> None:
    made = plan_of(WIDE, (0, 1, 2, 4), num_micro_batches=8)
    num_computes = sum(i.opcode is Opcode.FORWARD for i in made.programs[0])
    assert num_computes > 2 * MOST_AHEAD

    def run(executor: Executor) -> tuple[float, float]:
        batch = given(made, WIDE, 0)
        executor.step(batch)
        for stage in executor._rank.stages.values():
            for module in modules_of(stage.plan, executor._model).values():
                if isinstance(module, nn.Linear):  # the device is busy, and the process is not
                    module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(BUSY_CYCLES))
        torch.cuda.synchronize()
        start = time.perf_counter()
        executor.step(batch)
        issued = time.perf_counter() - start
        torch.cuda.synchronize()
        return issued, time.perf_counter() - start

    ((issued, done),) = on_gpu(made, WIDE, run)
    assert issued < done  # the process did not wait for the end of the step
    assert issued > done / 4  # but it did for that of most computes


def test_the_timeline_shows_copies_beside_compute() -> None:
    """Layers whose compute takes longer than the copies of the next one's state."""

    def build() -> nn.Module:
        return Wide(lambda: nn.Linear(2048, 2048), 8)

    def batch(batch_size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, 8192, 2048), "y": torch.randn(batch_size, 1)}

    model_file = model_of(build, mean_square, batch)
    made = plan_of(
        model_file, tuple(range(9)), micro_batch_size=1, num_micro_batches=8, offload_state=True
    )

    def run(executor: Executor) -> list[tuple[str, float, float]]:
        for _ in range(3):
            result = executor.step(given(made, model_file, 0))
        events = zip(made.programs[0], result.timeline.events, strict=True)
        return [(i.stream, e.start_seconds, e.end_seconds) for i, e in events]

    (found,) = on_gpu(made, model_file, run)
    assert all(start <= end for _, start, end in found)
    compute = [(start, end) for stream, start, end in found if stream == "compute"]
    copies = [(start, end) for stream, start, end in found if stream.startswith("copy.")]
    beside = [
        (start, end)
        for start, end in copies
        if any(first < end and start < last for first, last in compute if last > first)
    ]
    assert len(beside) > len(copies) / 2
