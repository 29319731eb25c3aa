"""Training in mixed precision by a plan gives what plain lines of torch give, to the last bit.

Exceptions are those of `test_parity`: a weight tied between two pipeline ranks, and replicas.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from half import HALF, Plain, assert_same, options_of
from planned import Chain, model_of, plan_of, traced, vectors
from stepping import batches, on_every_rank
from torch import Tensor, nn
from training import EXAMPLES, even_plan, example

from planner.cli.check import main as check_command
from planner.cli.plan import main as plan_command
from planner.cli.profile import main as profile_command
from planner.errors import UsageError
from planner.measure.file import read_profile
from planner.model_file import ModelFile
from planner.plan.file import print_plan, read_plan
from planner.plan.types import Opcode
from planner.precision import Precision
from planner.schedules import Schedule
from planner.trace import trace
from runtime.executor import Executor


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def dropping() -> ModelFile:
    """Layers with dropout, running statistics, a frozen matrix and a weight used twice."""

    def layer() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8)
        )

    def build() -> nn.Module:
        model = Chain(layer)
        model.layers[1][0].weight.requires_grad_(False)
        model.layers[3][0].weight = model.layers[0][0].weight
        return model

    return model_of(build, batch=vectors)


LAYOUTS = [
    {},
    {"recompute": True, "schedule": Schedule.PLAIN},
    {"offload_state": True},
    {"offload_inputs": True, "recompute": True},
    {"num_pipeline_ranks": 2, "stage_ranks": (0, 1, 0, 0)},
]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_replica_is_bitwise(layout: dict[str, Any], precision: Precision) -> None:
    """Dropout, buffers, frozen and tied parameters (on one rank), with the state offloaded or not.

    AdamW's pieces are whole parameters here.
    """
    model_file = dropping()
    options = options_of(precision)
    plan = plan_of(model_file, (0, 3, 6, 9, 13), options=options, **layout)
    assert_same(model_file, plan)


@pytest.mark.parametrize("precision", HALF)
def test_the_norm_is_of_gradients_without_the_scale(precision: Precision) -> None:
    """The norm itself is taken in another order than torch's."""
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    plan = plan_of(model_file, (0, 2, 5), options=options_of(precision, clip_norm=0.1))
    plain, given = Plain(model_file, plan), batches(plan, model_file, 0)
    _, gradients = plain.step(0, given)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    (found,) = on_every_rank(plan, model_file, lambda rank: rank.step(given[0]).gradient_norm)
    assert norm > 0.1
    assert found == pytest.approx(norm, rel=1e-6)
    assert_same(model_file, plan, tolerance=1e-6)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.ZERO_BUBBLE])
def test_a_pipeline_is_bitwise(schedule: Schedule, precision: Precision) -> None:
    model_file = replace(
        model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()))),
        build_optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    )
    plan = plan_of(
        model_file,
        (0, 3, 5),
        num_pipeline_ranks=2,
        options=options_of(precision),
        schedule=schedule,
    )
    assert_same(model_file, plan)


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("num_pipeline_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["gpt", "resnet", "unet", "mlp"])
def test_examples(name: str, num_pipeline_ranks: int, precision: Precision) -> None:
    for stages_per_rank, num_micro_batches, recompute in ((1, 2, False), (3, 4, True)):
        plan = even_plan(
            name,
            num_pipeline_ranks=num_pipeline_ranks,
            stages_per_rank=stages_per_rank,
            num_micro_batches=num_micro_batches,
            recompute=recompute,
            options=options_of(precision),
        )
        is_tied = any(len(unit.ranks) > 1 for unit in plan.units)
        assert_same(example(name)[0], plan, tolerance=1e-2 if is_tied else 0.0)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("partition", [0, 1, 2, 3])
def test_replicas_are_close(partition: int, precision: Precision) -> None:
    """Gradients of micro-batches are those of the reference; float32 sums are added otherwise."""
    model_file = model_of(lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU())))
    for more in ({}, {"offload_state": True, "num_pipeline_ranks": 2}):
        plan = plan_of(
            model_file,
            (0, 2, 5),
            num_replicas=2,
            partition=partition,
            options=options_of(precision),
            **more,
        )
        assert_same(model_file, plan, tolerance=1e-6)


def test_half_of_the_bytes_are_gathered_and_whole_floats_reduced() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    found = {}
    for precision in (Precision.MODEL, Precision.BFLOAT16):
        for partition in (1, 2, 3):
            plan = plan_of(
                model_file,
                (0, 2, 5),
                num_replicas=2,
                partition=partition,
                options=options_of(precision),
            )

            given = batches(plan, model_file, 0)

            def traffic(
                executor: Executor, given: list[dict[str, Tensor]] = given
            ) -> Mapping[str, int]:
                executor.step(given[executor.replica])
                return dict(executor.traffic.num_bytes)

            found[precision, partition] = on_every_rank(plan, model_file, traffic)[0]
    for partition in (1, 2, 3):
        whole, half = found[Precision.MODEL, partition], found[Precision.BFLOAT16, partition]
        padding = 2 * 2 * 64 if partition < 3 else 0  # of the last parameter of each unit
        assert abs(2 * half["gather"] - whole["gather"]) <= padding
        assert abs(half["reduce"] - whole["reduce"]) <= 2 * padding


def test_the_loss_scale_is_halved_and_doubled_as_torchs_is() -> None:
    """Of one micro-batch a scale of 65536 is beyond float16: that step updates nothing."""
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    options = options_of(Precision.FLOAT16, save=True)
    plan = plan_of(model_file, (0, 5), num_micro_batches=1, options=options)
    assert assert_same(model_file, plan) == [2.0**16, 2.0**15, 2.0**15]

    def run(executor: Executor) -> Any:
        before = executor.state_dict()
        assert executor.step(batches(plan, model_file, 0)[0]).finite is False
        assert all(torch.equal(before[k], v) for k, v in executor.state_dict().items())
        scale = executor._rank.loss_scale
        assert scale is not None
        assert executor.checkpoint().loss_scale == scale
        scale.num_good_steps = 1999
        assert executor.step(batches(plan, model_file, 1)[0]).finite
        return executor.loss_scale

    (scale,) = on_every_rank(plan, model_file, run)
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=2000)
    assert (scale.scale, scale.num_good_steps) == (2.0**16, 0)
    assert torchs.get_growth_factor() == 1 / torchs.get_backoff_factor() == 2.0


def test_evaluation_computes_in_half() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    plan = plan_of(model_file, (0, 2, 5), options=options_of(Precision.BFLOAT16))
    plain = Plain(model_file, plan)

    def run(executor: Executor) -> list[Tensor]:
        return list(executor.evaluate(batches(plan, model_file, 0)[0]).losses)

    (losses,) = on_every_rank(plan, model_file, run)
    assert {loss.dtype for loss in losses} == {torch.bfloat16}
    assert all(map(torch.equal, losses, plain.step(0, batches(plan, model_file, 0))[0]))
    assert Opcode.UPDATE in {i.opcode for i in plan.programs[0]}


class Rotating(nn.Module):
    """A buffer alone: a table of angles."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.linspace(0.0, 1.234567, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.angles.cos()


@functools.cache
def with_norms() -> ModelFile:
    """Norms and a table in float32: the norms by weights that two of them share."""

    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Rotating(), nn.GELU())

    def build() -> nn.Module:
        model = Chain(layer)
        model.layers[2][1].weight = model.layers[0][1].weight
        return model

    patterns = ("layers.0.1.weight", "layers.[13].1.*", "*.angles")
    return replace(model_of(build), keep_float32=patterns)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("layout", [{}, {"offload_state": True, "recompute": True}], ids=str)
def test_exceptions_compute_in_float32(layout: dict[str, Any], precision: Precision) -> None:
    model_file = with_norms()
    kept = (nn.BatchNorm1d, Rotating)
    options = options_of(precision, keep_float32=model_file.keep_float32)
    count = len(traced(model_file, precision).layer_graph(2).layers)
    plan = plan_of(model_file, (0, 2, count), options=options, **layout)
    assert {unit.weights_dtype for unit in plan.units} == {"float32", precision.value}
    assert {unit.dtype for unit in plan.units} == {"float32"}
    assert_same(model_file, plan, kept=kept)
    for partition in (1, 2, 3):
        plan = plan_of(
            model_file, (0, 2, count), num_replicas=2, partition=partition, options=options
        )
        assert_same(model_file, plan, kept=kept, tolerance=1e-6)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nrom.*is to stay in float32"):
        trace(with_norms(), Precision.BFLOAT16, ("*.nrom.*",))


def test_the_command_line(tmp_path: Path) -> None:
    """Plan and check with an exception, and what is contradictory."""
    model, plan = str(EXAMPLES / "mlp.py"), str(tmp_path / "plan.yaml")
    runner, common = CliRunner(), ["--gpus", "1", "--cluster", "v100-32", "--output", plan]
    mixed = ["--precision", "bfloat16", "--keep-float32", "*.bias"]
    result = runner.invoke(plan_command, [model, *common, *mixed, "--micro-batches", "2"])
    assert result.exit_code == 0, result.output
    assert "computed in bfloat16 on float32 masters" in result.output
    made = read_plan(plan)
    assert made.options.precision is Precision.BFLOAT16
    assert made.options.keep_float32 == ("*.bias",)
    assert print_plan(made) == Path(plan).read_text()
    assert runner.invoke(check_command, [plan]).exit_code == 0
    profile = tmp_path / "profile.yaml"
    words = ["--device", "cpu", "--repeats", "1", "--output", str(profile), *mixed]
    result = runner.invoke(profile_command, [model, *words])
    assert result.exit_code == 0, result.output
    assert read_profile(profile).keep_float32 == ("*.bias",)
    common = ["--gpus", "1", "--cluster", "cpu", "--output", plan, "--profile", str(profile)]
    result = runner.invoke(plan_command, [model, *common, *mixed, "--batch-size", "2"])
    assert "layers    measured on" in result.output
    result = runner.invoke(plan_command, [model, *common, *mixed[:2]])
    assert "measured of the model in bfloat16, *.bias in float32" in " ".join(result.output.split())
    result = runner.invoke(plan_command, [model, *common, "--keep-float32", "*.bias"])
    assert result.exit_code == 2
    assert "no other type was asked for" in result.output
