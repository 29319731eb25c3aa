"""Stages whose layers and loss are compiled: the same bits, once, and what is not is said.

Most of it with the backend `aot_eager`, which needs no C++ compiler and computes what eager code
does. In this test run every warning is an error, such as that something was compiled in a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import Chain, model_of, plan_of
from stepping import CPU, LAYOUTS, batches, linears
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from training import even_plan, example, relative_rms

from planner.errors import UsageError
from planner.model_file import ModelFile
from planner.plan.types import Plan, PlanOptions
from planner.precision import Precision
from planner.schedules import Schedule
from runtime.backends import check_backend, has_cpp_compiler
from runtime.build import make_executor
from runtime.compile import CompileReport, EagerPart
from runtime.executor import Executor
from runtime.local import run_local
from runtime.verify import tolerance_of

ONE_STAGE = (Schedule.ZERO_BUBBLE, Schedule.ONE_F_ONE_B)
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one rank's steps left."""

    losses: list[Tensor]
    state: dict[str, Tensor]
    report: CompileReport | None


def train(
    made: Plan, model_file: ModelFile, backend: str | None, *, evaluates: bool = True
) -> list[Trained]:
    """Some steps with evaluations in between, by rank; nothing is compiled after the first."""
    given = [batches(made, model_file, step) for step in range(NUM_STEPS)]

    def act(executor: Executor) -> Trained:
        losses: list[Tensor] = []
        for step, batch in enumerate(given):
            num_graphs = counters["stats"]["unique_graphs"]
            losses += executor.step(batch[executor.replica]).losses
            assert counters["stats"]["unique_graphs"] == num_graphs or step == 0
            if evaluates:
                losses += executor.evaluate(batch[executor.replica]).losses
        return Trained(losses=losses, state=executor.state_dict(), report=executor.compile_report)

    return on_ranks(made, model_file, backend, act)


def on_ranks(
    made: Plan, model_file: ModelFile, backend: str | None, act: Callable[[Executor], Any]
) -> list[Any]:
    def run(transport: Any, world_rank: int) -> Any:
        executor = make_executor(made, model_file, transport, world_rank, CPU, None, backend)
        try:
            return act(executor)
        finally:
            executor.close()

    return run_local(made, run)


def assert_same_bits(made: Plan, model_file: ModelFile, **settings: Any) -> CompileReport:
    """Of compiled and of eager training; what was compiled."""
    compiled = train(made, model_file, "aot_eager", **settings)
    for mine, eager in zip(compiled, train(made, model_file, None, **settings), strict=True):
        assert eager.report is None
        assert len(mine.losses) == len(eager.losses)
        assert all(map(torch.equal, mine.losses, eager.losses))
        assert mine.state.keys() == eager.state.keys()
        assert all(torch.equal(value, eager.state[key]) for key, value in mine.state.items())
    report = compiled[0].report
    assert report is not None
    assert all(each.report is not None and each.report.eager == report.eager for each in compiled)
    return report


@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        {"recompute": True},
        {"num_replicas": 2, "partition": 3, "recompute": True},
        {"offload_inputs": True},
        {"offload_state": True, "recompute": True},
        {"num_micro_batches": 1},
        {"num_pipeline_ranks": 1},
        {"num_pipeline_ranks": 1, "num_replicas": 2, "partition": 3},
        {"options": PlanOptions(clip_norm=0.1, check_finite=True)},
    ],
    ids=str,
)
def test_the_bits_are_those_of_eager_stages(layout: dict[str, Any]) -> None:
    model_file = linears()
    boundaries = (0, 3, 5) if layout.get("schedule") in ONE_STAGE else (0, 2, 4, 5)
    made = plan_of(model_file, boundaries, **{"num_pipeline_ranks": 2} | layout)
    report = assert_same_bits(made, model_file)
    if layout.get("schedule") is Schedule.ZERO_BUBBLE:
        assert {part.stage for part in report.eager} == {0, 1}
        assert all("backward is split" in part.reason for part in report.eager)
        assert sum(report.num_graphs) == 0
    else:
        assert report.eager == ()
        assert all(number > 0 for number in report.num_graphs)


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FLOAT16])
def test_mixed_precision(precision: Precision) -> None:
    model_file = linears()
    options = PlanOptions(precision=precision, deadline_seconds=20)
    made = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, options=options)
    assert assert_same_bits(made, model_file).eager == ()


@pytest.mark.parametrize(
    ("name", "changing"),
    [
        ("gpt", []),
        pytest.param("resnet", ["layer 'stem.2'"], marks=pytest.mark.slow),
        ("mlp", []),
    ],
)
def test_the_examples(name: str, changing: list[str]) -> None:
    """Tied weights, and running statistics whose stage is recomputed."""
    model_file, _ = example(name)
    made = even_plan(
        name, num_pipeline_ranks=2, stages_per_rank=2, num_micro_batches=2, recompute=True
    )
    report = assert_same_bits(made, model_file, evaluates=False)
    random = {s.index for s in made.stages if any(c.num_random_operators for c in s.code)}
    assert {part.stage for part in report.eager if not part.what} == random
    assert [part.what for part in report.eager if part.what] == changing


def test_layers_that_are_alike_share_what_is_compiled() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8), num_layers=12))
    made = plan_of(model_file, (0, 4, 8, 13))
    (found,) = train(made, model_file, "aot_eager", evaluates=False)
    assert found.report is not None
    # The first layer's input needs no gradient, and the head has another width.
    assert found.report.num_graphs == (len({"first", "others", "head", "loss"}),)


class Uneven(nn.Module):
    """A number of parameters that leaves what follows them unaligned, where they are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.scale


@pytest.mark.parametrize(("partition", "num_kinds"), [(0, 1), (3, 3)])
def test_layers_that_lie_otherwise_in_memory_share_nothing(partition: int, num_kinds: int) -> None:
    """A GPU's kernels are made for weights that are aligned, or are not, as the first were."""
    model_file = model_of(lambda: Chain(Uneven, num_layers=4))
    made = plan_of(model_file, (0, 1, 5), num_replicas=2, partition=partition)
    found = train(made, model_file, "aot_eager", evaluates=False)[0]
    assert found.report is not None
    assert found.report.num_graphs[0] == len(("first", "head", "loss")) + num_kinds


class Block(nn.Module):
    """What a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.linear(self.norm(x)))


class Breaking(nn.Linear):
    """What torch.compile cannot compile whole."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y * 2


class Counting(nn.Linear):
    """A number of Python's that changes at every call."""

    num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(x) * (1.0 if self.num_calls > 0 else 2.0)


class Averaging(nn.Module):
    """A buffer changed in place, on which the gradient depends: torch 2.13 compiles it wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * x.mean(0))
        return (x - self.average) * self.scale


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Breaking(8, 8), "could not be compiled"),
        (lambda: Counting(8, 8), "compiled anew at every call"),
        (Averaging, "changes in place a buffer"),
    ],
    ids=["breaking", "counting", "averaging"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_run_eagerly_all_the_same(
    layer: Callable[[], nn.Module], reason: str, recompute: bool
) -> None:
    model_file = model_of(lambda: Chain(layer))
    made = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, recompute=recompute)
    report = assert_same_bits(made, model_file)
    assert [(part.stage, part.what) for part in report.eager] == [
        (0, "layer 'layers.0'"), (0, "layer 'layers.1'"),
        (1, "layer 'layers.2'"), (1, "layer 'layers.3'"),
    ]  # fmt: skip
    assert all(reason in part.reason for part in report.eager)
    (line,) = report.explain()
    assert "layer 'layers.1' of stage 0" in line
    assert report.num_graphs[1] > 0  # the head and the loss


def test_stages_that_draw_random_numbers_run_eagerly() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))))
    made = plan_of(model_file, (0, 2, 4, 5), num_pipeline_ranks=2)
    report = assert_same_bits(made, model_file)
    assert [part.name for part in report.eager] == ["stage 0", "stage 1"]
    (line,) = report.explain()
    assert line.startswith("not compiled: stage 0, stage 1: its random operators")
    assert list(report.explain(known=report.eager)) == []


def test_many_stages_are_named_in_short() -> None:
    parts = tuple(EagerPart(stage=index, what="", reason="why") for index in range(7))
    (line,) = CompileReport(backend="x", num_graphs=(0,), eager=parts).explain()
    assert line == "not compiled: stage 0, stage 1, stage 2, stage 3, stage 4 and 2 more: why"


def test_running_statistics_are_of_real_samples_only() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.BatchNorm1d(8)))
    made = plan_of(model_file, (0, 2, 5), num_micro_batches=2)

    def fresh(executor: Executor) -> dict[str, Tensor]:
        return executor.buffers()

    (compiled,) = on_ranks(made, model_file, "aot_eager", fresh)
    (eager,) = on_ranks(made, model_file, None, fresh)
    assert compiled.keys() == eager.keys()
    assert all(torch.equal(value, eager[key]) for key, value in compiled.items())
    assert assert_same_bits(made, model_file).eager == ()


def test_a_plan_that_only_evaluates() -> None:
    model_file = linears()
    made = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2).forward_only()
    given = batches(made, model_file, 0)[0]

    def act(executor: Executor) -> tuple[list[Tensor], CompileReport | None]:
        assert executor.compile_report is None
        return list(executor.evaluate(given).losses), executor.compile_report

    compiled = on_ranks(made, model_file, "aot_eager", act)
    eager = on_ranks(made, model_file, None, act)
    assert all(map(torch.equal, compiled[1][0], eager[1][0]))
    assert compiled[0][1].eager == ()
    assert all(number > 0 for number in compiled[0][1].num_graphs)


def test_a_dispatch_mode_of_the_users_own_sees_operators() -> None:
    """And what is compiled is used again after it."""
    model_file = linears()
    made = plan_of(model_file, (0, 2, 5))
    given = batches(made, model_file, 0)[0]

    def act(executor: Executor) -> tuple[Tensor, ...]:
        with FlopCounterMode(display=False) as counter:
            losses = executor.step(given).losses
        assert counter.get_total_flops() > 0
        return (*losses, *executor.step(given).losses)

    compiled, eager = (on_ranks(made, model_file, each, act)[0] for each in ("aot_eager", None))
    assert all(map(torch.equal, compiled, eager))


def test_steps_run_what_was_compiled() -> None:
    model_file = linears()
    made = plan_of(model_file, (0, 2, 5))
    given = batches(made, model_file, 0)[0]

    def act(executor: Executor) -> int:
        with torch.profiler.profile() as profile:
            executor.step(given)
        return sum(event.name.startswith("Torch-Compiled Region") for event in profile.events())

    num_layers, num_micro_batches = 5, made.num_micro_batches
    assert on_ranks(made, model_file, "aot_eager", act) == [(num_layers + 1) * num_micro_batches]
    assert on_ranks(made, model_file, None, act) == [0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # inductor's own
@pytest.mark.skipif(not has_cpp_compiler(), reason="inductor needs a C++ compiler: none here")
@pytest.mark.parametrize(
    "layout",
    [{}, pytest.param({"num_replicas": 2, "partition": 3}, marks=pytest.mark.slow)],
    ids=str,
)
def test_inductor(layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model_file = model_of(lambda: Chain(Block))
    made = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, **layout)
    counters.clear()
    compiled, eager = train(made, model_file, "inductor"), train(made, model_file, None)
    assert counters["aot_autograd"]["total"] > 0
    for mine, plain in zip(compiled, eager, strict=True):
        assert mine.report is not None
        assert mine.report.eager == ()
        assert all(number > 0 for number in mine.report.num_graphs)
        for found, wanted in zip(mine.losses, plain.losses, strict=True):
            assert relative_rms(found, wanted) <= 1e-5
        for key, value in mine.state.items():
            assert relative_rms(value, plain.state[key]) <= 1e-5, key


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="no backend 'inducter'") as error:
        check_backend("inducter", CPU)
    assert error.value.hint == "did you mean 'inductor'?"


def test_inductor_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        check_backend("inductor", CPU)
    check_backend("aot_eager", CPU)


def test_verification_allows_for_rounding() -> None:
    made = plan_of(model_of(lambda: Chain(lambda: nn.Linear(8, 8))), (0, 2, 5))
    assert tolerance_of(made, made.units[0]) == 0.0
    assert tolerance_of(made, made.units[0], is_compiled=True) == pytest.approx(1e-5)
