"""Ends of steps: the finite check, clipping, checkpoints."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from planned import model_of, plan_of
from stepping import (
    CPU,
    LAYOUTS,
    assert_close,
    batches,
    linears,
    on_every_rank,
    plain_gradients,
    whole_state,
)
from test_parity_schedules import MODELS, plan
from torch import Tensor, nn

from planner.plan.types import PlanOptions
from planner.schedules import Schedule
from runtime.build import build_model
from runtime.executor import Executor
from runtime.result import StepResult
from runtime.shards import UnitState

SGD = partial(torch.optim.SGD, lr=100.0)
"""Its steps are as large as the weights, so that the clipped gradient shows in them."""


SMALL_SGD = partial(torch.optim.SGD, lr=0.1)
"""Its steps stay small where a gradient is not clipped."""


@pytest.mark.parametrize("limit", [1e9, 1e-2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_clipping_is_that_of_torch(name: str, layout: dict[str, Any], limit: float) -> None:
    model_file = replace(MODELS[name], build_optimizer=SGD)
    options = PlanOptions(deadline_seconds=20, clip_norm=limit, check_finite=True)
    made = plan(name, options=options, **layout)
    given = batches(made, model_file, 0)
    model = build_model(model_file, made.options.seed, CPU)
    plain_gradients(made, model_file, model, 0, given)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    assert (norm > limit) == (limit < 1)
    SGD(model.parameters()).step()

    def run(executor: Executor) -> tuple[StepResult, dict[str, Tensor]]:
        return executor.step(given[executor.replica]), executor.state_dict()

    found = on_every_rank(made, model_file, run)
    state = whole_state(made, [part for _, part in found])
    for result, _ in found:
        assert result.finite is True
        assert result.gradient_norm == pytest.approx(norm, rel=1e-6)
        assert result.gradient_norm == found[0][0].gradient_norm
    is_bitwise = limit > 1 and made.num_replicas == 1 and name == "mlp"
    for key, after in model.state_dict().items():
        if key in state and is_bitwise:
            assert torch.equal(state[key], after), key
        elif key in state:
            assert_close(state[key], after, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_a_delayed_clip_scales_by_the_norm_of_the_step_before(
    name: str, layout: dict[str, Any]
) -> None:
    limit, num_steps = 1e-2, 3
    model_file = replace(MODELS[name], build_optimizer=SMALL_SGD)
    options = PlanOptions(deadline_seconds=20, clip_norm=limit, clip_delayed=True)
    made = plan(name, options=options, **layout)
    given = [batches(made, model_file, step) for step in range(num_steps)]
    model = build_model(model_file, made.options.seed, CPU)
    optimizer, norms = SMALL_SGD(model.parameters()), list[float]()
    for step, batch in enumerate(given):
        plain_gradients(made, model_file, model, step, batch)
        norm = float(
            torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        )
        for parameter in model.parameters():
            if norms and parameter.grad is not None:
                parameter.grad.mul_(min(1.0, limit / (norms[-1] + 1e-6)))
        norms.append(norm)
        optimizer.step()

    def run(executor: Executor) -> tuple[list[float | None], dict[str, Tensor]]:
        results = [executor.step(batch[executor.replica]) for batch in given]
        return [result.gradient_norm for result in results], executor.state_dict()

    found = on_every_rank(made, model_file, run)
    state = whole_state(made, [part for _, part in found])
    for found_norms, _ in found:
        assert found_norms == pytest.approx(norms, rel=1e-5)
    assert norms[0] > limit
    for key, after in model.state_dict().items():
        if key in state:
            assert_close(state[key], after, 1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_updates_nothing_anywhere(
    layout: dict[str, Any], value: float
) -> None:
    model_file = linears()
    num_stages = 2 if layout["schedule"] in (Schedule.ZERO_BUBBLE, Schedule.ONE_F_ONE_B) else 4
    boundaries = (0, 3, 5) if num_stages == 2 else (0, 1, 2, 3, 5)
    options = PlanOptions(deadline_seconds=20, check_finite=True, save=True)
    made = plan_of(
        model_file, boundaries, num_pipeline_ranks=2, num_micro_batches=4, options=options, **layout
    )
    given = [batches(made, model_file, step) for step in range(3)]
    given[1][-1]["y"][-1, 0] = value  # in the last micro-batch of the last replica

    def run(executor: Executor) -> tuple[list[bool | None], list[dict[str, Tensor]], list[Any]]:
        verdicts, states, checkpoints = [], [], []
        for step in range(3):
            verdicts.append(executor.step(given[step][executor.replica]).finite)
            states.append(executor.state_dict())
            checkpoints.append(executor.checkpoint())
        return verdicts, states, checkpoints

    model = build_model(model_file, made.options.seed, CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in (0, 2):
        plain_gradients(made, model_file, model, step, given[step])
        optimizer.step()
        scheduler.step()
    found = on_every_rank(made, model_file, run)
    for verdicts, states, checkpoints in found:
        assert verdicts == [True, False, True]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        first, second = checkpoints[:2]
        assert (first.num_steps, second.num_steps) == (1, 2)
        for unit, shard in first.shards.items():
            assert torch.equal(shard, second.shards[unit])
            for name, moments in first.moments[unit].items():
                for key, moment in moments.items():
                    assert torch.equal(moment, second.moments[unit][name][key])
    state = whole_state(made, [states[2] for _, states, _ in found])
    for key, plain in model.state_dict().items():
        if made.num_replicas == 1:
            assert torch.equal(state[key], plain), key
        else:
            assert_close(state[key], plain, 1e-6)


@pytest.mark.parametrize("offload_state", [False, True])
@pytest.mark.parametrize(("num_replicas", "partition"), [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_a_checkpoint_is_the_state_after_its_step(
    num_replicas: int, partition: int, offload_state: bool
) -> None:
    model_file = linears()
    options = PlanOptions(deadline_seconds=20, save=True)
    made = plan_of(
        model_file,
        (0, 2, 5),
        num_pipeline_ranks=2,
        num_replicas=num_replicas,
        partition=partition,
        offload_state=offload_state,
        options=options,
    )
    given = [batches(made, model_file, step) for step in range(3)]
    model = build_model(model_file, made.options.seed, CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    plain = []
    for step in range(3):
        plain_gradients(made, model_file, model, step, given[step])
        optimizer.step()
        scheduler.step()
        plain.append(
            {
                name: (p.detach().clone(), optimizer.state[p]["exp_avg_sq"].clone())
                for name, p in model.named_parameters()
            }
        )

    def run(executor: Executor) -> list[Any]:
        found = []
        for step in range(3):
            executor.step(given[step][executor.replica])
            found.append(executor.checkpoint())
        executor.evaluate(given[0][executor.replica])
        assert executor.checkpoint() is found[-1]
        return found

    for world_rank, found in enumerate(on_every_rank(made, model_file, run)):
        replica = made.coordinates(world_rank)[1]
        for step, checkpoint in enumerate(found):
            assert checkpoint.num_steps == step + 1
            for unit in (u for u in made.units if u.name in checkpoint.shards):
                state = UnitState(unit, made, model_file.build_model(), replica)
                for piece in state.pieces:
                    weight, square_ = plain[step][piece.name]
                    first = state.ranges[piece.name][0]
                    part = slice(piece.first - first, piece.last - first)
                    shard = checkpoint.shards[unit.name]
                    values = shard[piece.first - state.first : piece.last - state.first]
                    moments = checkpoint.moments[unit.name][piece.name]
                    assert float(moments["step"]) == step + 1
                    assert_close(values, weight.reshape(-1)[part], 1e-6 * (num_replicas > 1))
                    mine = moments["exp_avg_sq"].reshape(-1)
                    assert_close(mine, square_.reshape(-1)[part], 1e-6 * (num_replicas > 1))


def test_a_step_that_fails_leaves_the_checkpoint_of_the_one_before() -> None:
    class Fragile(nn.Linear):
        """Fails in the backward of the third step, which stage 1 has then updated in."""

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            output = super().forward(input)
            if not isinstance(output, torch._subclasses.FakeTensor) and output.requires_grad:
                output.register_hook(self.count)
            return output

        def count(self, _: Tensor) -> None:
            self.num_calls = getattr(self, "num_calls", 0) + 1
            if self.num_calls == 5:
                raise ArithmeticError("no")

    model_file = model_of(
        lambda: nn.Sequential(Fragile(8, 8), nn.Linear(8, 4)),
        batch=lambda size: {"input": torch.randn(size, 8), "y": torch.randn(size, 4)},
    )
    options = PlanOptions(deadline_seconds=20, save=True)
    made = plan_of(model_file, (0, 1, 2), num_micro_batches=2, options=options)

    def run(executor: Executor) -> None:
        for step in range(2):
            executor.step(batches(made, model_file, step)[0])
        before = executor.checkpoint()
        copies = {unit: shard.clone() for unit, shard in before.shards.items()}
        with pytest.raises(ArithmeticError):
            executor.step(batches(made, model_file, 2)[0])
        assert executor.checkpoint() is before
        assert before.num_steps == 2
        assert all(torch.equal(before.shards[unit], copies[unit]) for unit in copies)

    on_every_rank(made, model_file, run)
