"""What verification notices, and what an executor refuses."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from planned import Chain, model_of, plan_of, vectors
from torch import Tensor, nn

from planner.errors import PlanFileError, RunError, UsageError
from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions
from runtime.build import build_model, make_executor
from runtime.data import Batches
from runtime.local import run_local
from runtime.verify import Difference, compare

CPU = torch.device("cpu")


def verify(plan: Plan, model_file: ModelFile) -> list[Difference]:
    def run(transport: Any, world_rank: int) -> list[Difference]:
        executor = make_executor(plan, model_file, transport, world_rank, CPU)
        _, found = compare(plan, model_file, Batches(model_file, plan), executor, 0)
        executor.close()
        return found

    return [difference for found in run_local(plan, run) for difference in found]


@pytest.mark.parametrize("has_moments", [False, True])
def test_a_parameter_that_the_plan_does_not_train_is_noticed(has_moments: bool) -> None:
    """By its moments when the plan is loaded, else by its gradient."""
    model_file = replace(
        model_of(lambda: Chain(lambda: nn.Linear(8, 8))),
        build_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9 if has_moments else 0.0),
    )
    plan = plan_of(model_file, (0, 2, 5), options=PlanOptions(optimizer_slots=int(has_moments)))
    assert all(difference.passed for difference in verify(plan, model_file))
    parameters = tuple(replace(p, trainable=p.name != "head.bias") for p in plan.parameters)
    forged = replace(plan, parameters=parameters)
    if has_moments:
        with pytest.raises(PlanFileError, match=r"moments:stage\.1"):
            verify(forged, model_file)
    else:
        assert [d.name for d in verify(forged, model_file) if not d.passed] == ["head.bias"]


def test_running_statistics_are_compared() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.BatchNorm1d(8)))
    plan = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, recompute=True)
    found = verify(plan, model_file)
    buffers = {d.name for d in found if d.name.startswith("buffer ")}
    assert len(buffers) == 3 * 4
    assert "buffer layers.3.running_var" in buffers
    assert all(difference.passed for difference in found)


def test_the_imaginary_part_is_compared() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.weight).abs()

    model_file = model_of(lambda: Chain(Rotation))
    found = verify(plan_of(model_file, (0, 2, 5), num_replicas=2), model_file)
    weights = [d for d in found if "weight" in d.name]
    assert weights
    assert all(d.passed for d in weights)


class OneNorm(Chain):
    """All layers share a normalisation."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(layer(x))
        output: Tensor = self.head(x)
        return output


@pytest.mark.parametrize("num_pipeline_ranks", [1, 2])
def test_statistics_that_several_stages_change_are_refused(num_pipeline_ranks: int) -> None:
    model_file = model_of(OneNorm)
    plan = plan_of(model_file, (0, 4, 9), num_pipeline_ranks=num_pipeline_ranks)
    with pytest.raises(UsageError, match="several stages call one BatchNorm1d"):
        verify(plan, model_file)
    assert all(d.passed for d in verify(plan_of(model_file, (0, 9)), model_file))


def test_a_loss_that_changes_the_batch_is_refused() -> None:
    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return (output - batch["y"].mul_(2)).square().mean()

    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)), loss_fn=loss_fn)
    with pytest.raises(UsageError, match="changes batch key 'y' in place"):
        verify(plan_of(model_file, (0, 5)), model_file)


def take_steps(model_file: ModelFile, *batches: dict[str, Tensor], close: bool = False) -> None:
    """Steps of one executor; the errors of all but the last are swallowed."""
    plan = plan_of(model_file, (0, 2, 5), num_micro_batches=2)

    def run(transport: Any, world_rank: int) -> None:
        executor = make_executor(plan, model_file, transport, world_rank, CPU)
        for batch in batches[:-1]:
            with pytest.raises((UsageError, ArithmeticError)):
                executor.step(batch)
        if close:
            executor.close()
        try:
            executor.step(batches[-1])
        finally:
            executor.close()

    run_local(plan, run)


def test_an_executor_is_not_used_after_an_error_inside_a_step() -> None:
    failures = iter([ArithmeticError("no")])

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        if not isinstance(output, torch._subclasses.FakeTensor):
            for failure in failures:
                raise failure
        return (output - batch["y"]).square().mean()

    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)), loss_fn=loss_fn)
    with pytest.raises(RunError, match="stopped in the middle of a step"):
        take_steps(model_file, vectors(4), vectors(4))
    with pytest.raises(RunError, match="is closed"):
        take_steps(model_file, vectors(4), close=True)


def test_a_refused_batch_does_no_harm() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    take_steps(model_file, {"x": torch.randn(4, 8)}, vectors(4))
    wrong = {"x": torch.randn(4, 8), "y": torch.randn(4, 4).double()}
    with pytest.raises(UsageError, match="'y' is of float64, but the plan is for float32"):
        take_steps(model_file, wrong)


def test_two_executors_in_one_process_do_not_meet() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    plan = plan_of(model_file, (0, 2, 5), num_micro_batches=2)
    batch = vectors(4)

    def run(transport: Any, world_rank: int) -> list[float | None]:
        executors = [make_executor(plan, model_file, transport, world_rank, CPU) for _ in "ab"]
        losses = [executor.step(batch).loss for _ in range(3) for executor in executors]
        for executor in executors:
            executor.close()
        return losses

    (losses,) = run_local(plan, run)
    assert losses[::2] == losses[1::2]
    assert build_model(model_file, 0, CPU).training
