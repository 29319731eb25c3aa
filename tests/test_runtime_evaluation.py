"""Evaluation: the eager losses, and nothing changed by it."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from models import own
from planned import Chain, model_of, plan_of, vectors
from stepping import CPU, LAYOUTS, batches, linears, on_every_rank, whole_state
from test_parity_schedules import MODELS, plan
from torch import Tensor, nn
from torch.nn import functional

from planner.errors import RunError, UsageError
from planner.model_file import ModelFile
from planner.plan.types import Plan
from planner.schedules import Schedule
from runtime.build import build_model
from runtime.executor import Executor
from runtime.local import run_local
from runtime.reference import loss_of_model

EVALUATED = {
    **MODELS,
    "glue": model_of(own.ClassToken, own.square, own.vectors),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "tied", "conv", "glue"])
def test_evaluation_gives_the_eager_losses_and_changes_nothing(
    name: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, EVALUATED[name])
    model_file, made = EVALUATED[name], plan(name, **layout)
    given = [batches(made, model_file, step) for step in range(2)]

    def run(executor: Executor, *, evaluates: bool) -> tuple[Any, ...]:
        losses = []
        if evaluates:
            losses.append(executor.evaluate(given[1][executor.replica]).losses)
        executor.step(given[0][executor.replica])
        state = executor.state_dict()
        if evaluates:
            result = executor.evaluate(given[1][executor.replica])
            assert (result.finite, result.gradient_norm) == (None, None)
            losses.append(result.losses)
            after = executor.state_dict()
            assert all(torch.equal(state[key], after[key]) for key in state)
        executor.step(given[1][executor.replica])
        return losses, state, executor.state_dict(), executor.replica

    found = on_every_rank(made, model_file, partial(run, evaluates=True))
    without = on_every_rank(made, model_file, partial(run, evaluates=False))
    for one, other in zip(found, without, strict=True):
        assert all(torch.equal(one[2][key], other[2][key]) for key in other[2])
    model = build_model(model_file, made.options.seed, CPU)
    fresh = [eager_losses(made, model_file, model, batch) for batch in given[1]]
    for losses, _, _, replica in found:
        state = whole_state(made, [part for _, part, _, _ in found], replica)
        model.load_state_dict(state, strict=False)
        trained = eager_losses(made, model_file, model, given[1][replica])
        for mine, plain in zip(losses, (fresh[replica], trained), strict=True):
            if mine:
                assert torch.equal(torch.stack(mine), plain)


def eager_losses(
    made: Plan, model_file: ModelFile, model: nn.Module, batch: dict[str, Tensor]
) -> Tensor:
    """Of the user's own module in evaluation mode, by micro-batch."""
    model.eval()
    size, loss_of = made.micro_batch_size, loss_of_model(model, model_file)
    rows = [
        {key: value[m * size : (m + 1) * size] for key, value in batch.items()}
        for m in range(made.num_micro_batches)
    ]
    with torch.no_grad():
        return torch.stack([loss_of(samples) for samples in rows])


def test_modules_are_in_their_own_modes_again_after_an_evaluation() -> None:
    model_file = linears()
    made = plan_of(model_file, (0, 5), num_micro_batches=2)
    model = model_file.build_model()

    def run(transport: Any, world_rank: int) -> None:
        executor = Executor(made, model, transport, world_rank, loss_fn=model_file.loss_fn)
        model.get_submodule("layers.1").eval()
        executor.evaluate(vectors(4))
        executor.close()

    run_local(made, run)
    assert not model.get_submodule("layers.1").training
    assert model.training
    assert model.get_submodule("layers.2").training


def test_a_plan_without_programs_for_evaluation_says_so() -> None:
    model_file = linears()
    made = replace(plan_of(model_file, (0, 5)), evaluation=())
    with pytest.raises(UsageError, match="no programs for evaluation"):
        on_every_rank(made, model_file, lambda executor: executor.evaluate({}))
    with pytest.raises(UsageError, match="leaves no checkpoint"):
        on_every_rank(made, model_file, lambda executor: executor.checkpoint())


def test_a_plan_of_an_evaluation_alone_evaluates_and_does_not_train() -> None:
    model_file = linears()
    made = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, num_replicas=2)
    (batch, _) = batches(made, model_file, 0)

    def evaluate(executor: Executor) -> tuple[Tensor, ...]:
        return executor.evaluate(batch).losses

    whole = on_every_rank(made, model_file, evaluate)
    alone = on_every_rank(made.forward_only(), model_file, evaluate)
    assert whole == alone
    assert any(whole)
    with pytest.raises(UsageError, match="only evaluates"):
        on_every_rank(made.forward_only(), model_file, lambda executor: executor.step(batch))


class Functional(nn.Module):
    """Normalises between its layers, by functions: by the batch alone, or by running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.full((8,), 0.5))
        self.register_buffer("variance", torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.batch_norm(self.one(x), None, None, training=True)
        hidden = functional.instance_norm(hidden.unflatten(1, (2, 4))).flatten(1)
        hidden = functional.batch_norm(hidden, self.mean, self.variance, training=self.training)
        output: Tensor = self.two(functional.dropout(hidden, 0.5, self.training))
        return output


def test_functions_between_layers_act_as_in_evaluation() -> None:
    model_file = model_of(Functional)
    made = plan_of(model_file, (0, 2), num_micro_batches=2)
    (given,) = batches(made, model_file, 0)
    (losses,) = on_every_rank(made, model_file, lambda executor: executor.evaluate(given).losses)
    model = build_model(model_file, made.options.seed, CPU)
    assert torch.equal(torch.stack(losses), eager_losses(made, model_file, model, given))


class Failing(nn.Linear):
    """Fails in evaluation mode."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training:
            raise ArithmeticError("no")
        return super().forward(input)


def test_an_evaluation_that_fails_leaves_the_modes_and_a_broken_executor() -> None:
    model_file = model_of(lambda: Chain(lambda: Failing(8, 8)))
    made = plan_of(model_file, (0, 2, 5), num_micro_batches=2)

    def run(executor: Executor) -> None:
        with pytest.raises(UsageError, match="batch"):  # before anything was done
            executor.evaluate({})
        executor.step(vectors(4))
        with pytest.raises(ArithmeticError):
            executor.evaluate(vectors(4))
        assert all(module.training for module in executor._model.modules())
        for act in (executor.step, executor.evaluate):
            with pytest.raises(RunError, match="was stopped in the middle of an evaluation"):
                act(vectors(4))

    on_every_rank(made, model_file, run)


def test_a_rank_that_loads_nothing_needs_no_batch_and_no_rank_draws_random_numbers() -> None:
    model_file = MODELS["mlp"]
    made = plan("mlp", Schedule.LAYERED, num_pipeline_ranks=3)
    (given,) = batches(made, model_file, 0)

    def run(executor: Executor) -> tuple[bool, tuple[Tensor, ...]]:
        batch = given if executor.loads_batch else {}
        return executor.loads_batch, executor.evaluate(batch).losses

    before = torch.get_rng_state()
    found = on_every_rank(made, model_file, run)
    assert [loads for loads, _ in found] == [True, False, True]
    assert [len(losses) for _, losses in found] == [0, 0, made.num_micro_batches]
    assert torch.equal(torch.get_rng_state(), before)
