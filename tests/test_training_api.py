"""The Python API of a training loop: hooks, gradients, weighted losses, a script of one's own."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import Chain, model_of, plan_of, square, vectors
from stepping import CPU, batches, linears, on_every_rank, plain_gradients
from synthetic import chain_cluster
from torch import Tensor, nn
from training import EXAMPLES, even_plan

import runtime
from planner.entry import plan_model
from planner.errors import FingerprintError, UsageError
from planner.model_file import ModelFile
from planner.plan.file import write_plan
from planner.plan.types import Plan, PlanOptions
from runtime.build import build_model
from runtime.executor import Executor
from runtime.reference import accumulate, loss_of_model
from runtime.report import not_finite_message
from runtime.result import StepResult

LAYOUTS: list[dict[str, Any]] = [
    {"boundaries": (0, 5)},
    {"boundaries": (0, 2, 4, 5), "num_pipeline_ranks": 2, "recompute": True},
    {"boundaries": (0, 2, 5), "num_replicas": 2, "num_pipeline_ranks": 2},
    {"boundaries": (0, 2, 5), "num_replicas": 2, "partition": 1},
    {"boundaries": (0, 2, 5), "num_replicas": 2, "partition": 0, "offload_state": True},
]


@pytest.fixture(scope="module")
def model_file() -> ModelFile:
    return linears()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_by_parameter(model_file: ModelFile, layout: dict[str, Any]) -> None:
    made = plan_of(model_file, **layout)
    given = batches(made, model_file, 0)

    def run(executor: Executor) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        seen: list[str] = []
        remove = executor.on_gradient(lambda part: seen.append(part.name))
        with executor.kept_gradients() as gradients:
            executor.step(given[executor.replica])
        parts = {}
        for name, part in gradients.parts.items():
            parts[f"{name} from {part.first}"] = part.values.reshape(-1)
        remove()
        executor.step(given[executor.replica])
        return gradients.whole(), parts, seen

    found = on_every_rank(made, model_file, run)
    model = build_model(model_file, 0, CPU)
    plain_gradients(made, model_file, model, 0, given)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert set().union(*(whole for whole, _, _ in found)) == wanted.keys()
    for whole, parts, seen in found:
        assert sorted(seen) == sorted(name.split()[0] for name in parts)  # of one step only
        for name, gradient in whole.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)
        for name, values in parts.items():
            first = int(name.split()[-1])
            flat = whole[name.split()[0]].reshape(-1)
            assert torch.equal(values, flat[first : first + len(values)])


def test_a_hook_may_change_a_gradient(model_file: ModelFile) -> None:
    made = plan_of(model_file, (0, 2, 5))

    def run(executor: Executor) -> tuple[Tensor, Tensor]:
        before = executor.state_dict()["head.weight"]
        remove = executor.on_gradient(
            lambda part: part.values.zero_() if part.name == "head.weight" else None
        )
        for group in (group for each in executor.optimizers for group in each.param_groups):
            group["weight_decay"] = 0.0
        executor.step(batches(made, model_file, 0)[0])
        remove()
        return before, executor.state_dict()["head.weight"]

    ((before, after),) = on_every_rank(made, model_file, run)
    assert torch.equal(before, after)


def test_hooks_see_every_step_and_its_rate(model_file: ModelFile) -> None:
    made = plan_of(model_file, (0, 2, 5))
    given = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> tuple[list[str], list[float | None]]:
        heard: list[str] = []
        rates: list[float | None] = []

        def after(result: StepResult) -> None:
            heard.append(f"after {executor.num_steps}")
            rates.append(result.learning_rate)

        executor.before_step(lambda batch: heard.append(f"before {len(batch)}"))
        remove = executor.after_step(after)
        executor.step(given)
        executor.evaluate(given)
        executor.step(given)
        remove()
        executor.step(given)
        return heard, rates

    ((heard, rates),) = on_every_rank(made, model_file, run)
    assert heard == ["before 2", "after 1", "before 2", "after 2", "before 2"]
    assert rates == [1e-3, 5e-4]  # halved by the scheduler after every step


def test_eval_and_train(model_file: ModelFile) -> None:
    made = plan_of(model_file, (0, 5))
    given = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> None:
        executor.eval()
        executor.evaluate(given)
        with pytest.raises(UsageError, match="call train"):
            executor.step(given)
        executor.train()
        executor.step(given)

    on_every_rank(made, model_file, run)


def test_a_batch_of_all_replicas_is_shared_out(model_file: ModelFile) -> None:
    made = plan_of(model_file, (0, 5), num_replicas=2)
    given = batches(made, model_file, 0)
    together = {key: torch.cat([part[key] for part in given]) for key in given[0]}

    def run(executor: Executor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float, float]:
        mine = executor.evaluate(given[executor.replica])
        shared = executor.evaluate(together)
        own = float(torch.stack(mine.losses).double().sum())
        return mine.losses, shared.losses, own, executor.mean_loss(mine)

    found = on_every_rank(made, model_file, run)
    for mine, shared, _, mean in found:
        assert all(torch.equal(a, b) for a, b in zip(mine, shared, strict=True))
        assert mean == pytest.approx(sum(own for _, _, own, _ in found) / 6, rel=1e-12)


IGNORED = -100


def tokens(batch_size: int) -> dict[str, Tensor]:
    """Sequences with few or many tokens that count; in a quarter of them none."""
    counted = torch.rand(batch_size, 6) < torch.randint(4, (batch_size, 1)) / 3
    labels = torch.randint(4, (batch_size, 6)).where(counted, IGNORED)
    return {"x": torch.randn(batch_size, 6, 8), "labels": labels}


def mean_over_tokens(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = nn.functional.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())
    return loss


def counted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["labels"] != IGNORED).sum()


@pytest.fixture(scope="module")
def by_token() -> ModelFile:
    plain = model_of(lambda: Chain(lambda: nn.Linear(8, 8)), mean_over_tokens, tokens)
    return replace(plain, loss_weight=counted_tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_loss_over_tokens_is_that_of_the_whole_batch(
    by_token: ModelFile, layout: dict[str, Any]
) -> None:
    made = plan_of(by_token, num_micro_batches=4, **layout)
    given = batches(made, by_token, 0)

    def run(executor: Executor) -> tuple[dict[str, Tensor], float, float]:
        with executor.kept_gradients() as gradients:
            result = executor.step(given[executor.replica])
        evaluated = executor.evaluate(given[executor.replica])
        return gradients.whole(), executor.mean_loss(result), executor.mean_loss(evaluated)

    found = on_every_rank(made, by_token, run)
    model = build_model(by_token, 0, CPU)
    together = {key: torch.cat([part[key] for part in given]) for key in given[0]}
    loss = mean_over_tokens(model(together["x"]), together)
    loss.backward()
    for whole, mean, _ in found:
        assert mean == pytest.approx(loss.item(), rel=1e-6)
        for name, gradient in whole.items():
            wanted = model.get_parameter(name).grad
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    if made.num_replicas == 1:  # and bit for bit what plain accumulation gives
        rows = [
            (0, m, {key: value[2 * m : 2 * m + 2] for key, value in given[0].items()})
            for m in range(4)
        ]
        loss_of = loss_of_model(model, by_token)
        accumulate(model, loss_of, rows, seed=0, step=0, weight_of=counted_tokens)
        for whole, _, _ in found:
            for name, gradient in whole.items():
                assert torch.equal(gradient, model.get_parameter(name).grad), name


@pytest.mark.parametrize("weight", [-1.0, float("nan"), torch.ones(2)])
def test_a_weight_that_is_none_is_refused(by_token: ModelFile, weight: Any) -> None:
    made = plan_of(by_token, (0, 5))
    given = batches(made, by_token, 0)[0]
    odd = replace(by_token, loss_weight=lambda _: weight)
    with pytest.raises(UsageError, match="not one number of at least 0"):
        on_every_rank(made, odd, lambda executor: executor.step(given))


def test_the_ported_script_prints_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = even_plan("planned_training", stages_per_rank=3, num_micro_batches=4, micro_batch_size=4)
    write_plan(made, tmp_path / "plan.yaml")
    monkeypatch.chdir(tmp_path)
    printed = []
    for script in ("plain_training", "planned_training"):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "step 9 loss 4." in printed[1]


@pytest.mark.slow
def test_the_ported_script_on_two_ranks(tmp_path: Path) -> None:
    made = even_plan(
        "planned_training",
        num_pipeline_ranks=2,
        stages_per_rank=2,
        num_micro_batches=4,
        micro_batch_size=4,
    )
    write_plan(made, tmp_path / "plan.yaml")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    plain, planned = (
        subprocess.run(
            [sys.executable, *words, str(EXAMPLES / script)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        ).stdout
        for words, script in (((), "plain_training.py"), (two, "planned_training.py"))
    )
    assert plain == planned
    assert "step 9 loss 4." in planned


def test_the_port_is_five_lines() -> None:
    plain = (EXAMPLES / "plain_training.py").read_text().splitlines()
    planned = (EXAMPLES / "planned_training.py").read_text().splitlines()
    assert sum("# lga" in line for line in planned[1:]) == 5
    assert len(planned) <= len(plain)


def alone(model_file: ModelFile) -> Plan:
    return plan_of(model_file, (0, 2, 5))


def test_connect_in_one_process(model_file: ModelFile, tmp_path: Path) -> None:
    write_plan(alone(model_file), tmp_path / "a.plan.yaml")
    given = batches(alone(model_file), model_file, 0)[0]
    assert model_file.build_optimizer is not None

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    model = build_model(model_file, 0, CPU)
    plain = build_model(model_file, 0, CPU)
    with runtime.connect(
        tmp_path / "a.plan.yaml", model, loss_fn=square, build_optimizer=optimizer
    ) as executor:
        executor.step(given)
        trained = executor.state_dict()
    plain_gradients(alone(model_file), model_file, plain, 0, [given])
    optimizer(plain.parameters()).step()
    assert all(torch.equal(trained[name], value) for name, value in plain.state_dict().items())


def test_planned_and_trained_from_python() -> None:
    model = Chain(lambda: nn.Linear(8, 8))
    made = plan_model(
        model,
        vectors,
        num_devices=1,
        cluster=chain_cluster(1),
        loss_fn=square,
        global_batch_size=6,
        time_limit_seconds=0.5,
    )
    assert made.global_batch_size == 6
    before = model.get_parameter("head.bias").clone()
    with runtime.connect(made, model, loss_fn=square) as executor:
        executor.step(vectors(6))
        assert not torch.equal(executor.state_dict()["head.bias"], before)


def test_connect_refuses(model_file: ModelFile) -> None:
    two = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2)
    with (
        pytest.raises(UsageError, match="has 2 ranks, and this process was started alone"),
        runtime.connect(two, model_file.build_model),
    ):
        pass
    with (
        pytest.raises(FingerprintError, match="made for another model"),
        runtime.connect(alone(model_file), nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_gradient_that_is_not_finite_is_named(
    model_file: ModelFile, layout: dict[str, Any]
) -> None:
    options = PlanOptions(deadline_seconds=20, check_finite=True)
    made = plan_of(model_file, options=options, **layout)
    given = batches(made, model_file, 0)

    def poisoned() -> nn.Module:
        model = model_file.build_model()
        model.get_parameter("head.bias").register_hook(lambda gradient: gradient * torch.inf)
        return model

    def run(executor: Executor) -> tuple[StepResult, list[str]]:
        return executor.step(given[executor.replica]), sorted(executor.state_dict())

    for result, _ in on_every_rank(made, model_file, run):
        assert (result.finite, dict(result.not_finite)) == (True, {})
    found = on_every_rank(made, replace(model_file, build_model=poisoned), run)
    held = {rank for rank, (_, names) in enumerate(found) if "head.bias" in names}
    for result, _ in found:
        assert not result.finite
        assert list(result.not_finite) == ["head.bias"]
        assert set(result.not_finite["head.bias"]) <= held
        message = "step 2: a gradient is not finite, nothing was updated: head.bias (rank"
        assert message in not_finite_message(2, result)
