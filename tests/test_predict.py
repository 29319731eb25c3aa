"""Predictions of 3D configurations: plans at degree 1, parts at others, and the command line."""

import csv
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from planner.cli.plan import main as plan_command
from planner.cli.predict import main as predict_command
from planner.cluster import resolve_cluster
from planner.cluster.types import Cluster
from planner.cost import split_profile, tensor_seconds
from planner.errors import UsageError
from planner.graph import LayerGraph
from planner.measure import measure, with_splits
from planner.model_file import load_model_file
from planner.plan.file import read_plan
from planner.precision import Precision
from planner.predict import Configuration, configurations, predict, ranked
from planner.predict.tensor import split_cluster, split_graph
from planner.profile import Profile
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.trace import trace

MODEL = '''
"""Blocks of 4 heads."""
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(found.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

def build_model():
    return nn.Sequential(nn.Embedding(128, 64), *(Block() for _ in range(6)), nn.Linear(64, 128))

def example_batch(batch_size):
    tokens = torch.randint(128, (batch_size, 32))
    return {"input": tokens, "target": tokens}

def loss_fn(output, batch):
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["target"].flatten())
'''


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "blocks.py"
    path.write_text(MODEL)
    return path


@cache
def measured(path: Path, size: int = 2) -> tuple[LayerGraph, Profile]:
    traced = trace(load_model_file(str(path)))
    return traced.layer_graph(size), with_splits(traced, measure(traced, size))


@cache
def a100(num_devices: int) -> Cluster:
    return resolve_cluster("a100-80", num_devices)


BASE = Configuration(
    num_replicas=2, num_pipeline_ranks=2, stages_per_rank=2, micro_batch_size=2, num_micro_batches=3
)


def run(command: click.Command, *arguments: str) -> Result:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_degree_1_is_the_simulation_of_the_plan(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run(
        plan_command, str(model_path), "--cluster", "a100-80", "--gpus", "4", "--time-limit", "2",
        "--replicas", "2", "--pipeline-ranks", "2", "--stages-per-rank", "2",
        "--micro-batch-size", "2", "--micro-batches", "3", "--partition", "3", "--recompute",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    plan = read_plan(tmp_path / "blocks.plan.yaml")
    ends = itertools.accumulate((len(stage.layers) for stage in plan.stages), initial=0)
    choice = replace(BASE, partition=3, recompute=True, boundaries=tuple(ends))
    found = predict(*measured(model_path), plan.cluster, choice)
    simulated = simulate(plan)
    assert plan.prediction is not None
    assert found.step_seconds == plan.prediction.step_seconds == simulated.step_seconds
    assert found.memory == simulated.memory
    assert found.breakdown.tensor_seconds == 0
    # Its own split is as good, or better.
    own = predict(*measured(model_path), plan.cluster, replace(choice, boundaries=None))
    assert own.step_seconds <= found.step_seconds * 1.02


def test_the_breakdown_adds_up(model_path: Path) -> None:
    graph, profile = measured(model_path)
    for schedule in (Schedule.LAYERED, Schedule.INTERLEAVED):
        choice = replace(BASE, tensor_degree=2, num_micro_batches=4, schedule=schedule)
        found = predict(graph, profile, a100(8), choice)
        assert found.breakdown.total_seconds == pytest.approx(found.step_seconds)
        assert min(found.breakdown.compute_seconds, found.breakdown.tensor_seconds) > 0


def test_all_reduces_are_those_of_every_micro_batch_and_recompute(model_path: Path) -> None:
    graph, profile = measured(model_path)
    cluster = a100(8)
    link = cluster.hosts[0].link
    forward, backward = (
        sum(column)
        for column in zip(*(tensor_seconds(x, 4, link) for x in profile.layers), strict=True)
    )
    choice = Configuration(
        num_pipeline_ranks=2, tensor_degree=4, micro_batch_size=2, num_micro_batches=3
    )
    for again in (False, True):
        found = predict(graph, profile, cluster, replace(choice, recompute=again))
        passes = 2 if again else 1
        expected = 3 * (passes * forward + backward) / 2  # mean over two ranks
        assert found.breakdown.tensor_seconds == pytest.approx(expected)


def test_degree_2_halves_split_flop_and_state(model_path: Path) -> None:
    graph, profile = measured(model_path)
    block, part = profile.layers[2], split_profile(profile, 2).layers[2]
    assert part.forward_flop * 2 == block.forward_flop
    assert part.backward_flop * 2 == block.backward_flop
    halves = {p.name: p.num_elements for p in split_graph(graph, profile, 2).parameters}
    for parameter in graph.parameters:
        whole = "norm" in parameter.name or parameter.name.endswith((".out.bias", ".down.bias"))
        expected = parameter.num_elements if whole else parameter.num_elements // 2
        assert halves[parameter.name] == expected
    one, two = (
        predict(graph, profile, a100(8), replace(BASE, tensor_degree=degree)) for degree in (1, 2)
    )
    for name in ("weights", "optimizer", "activations"):
        before, after = (getattr(found.memory[0], name) for found in (one, two))
        assert before / 2 < after < 0.7 * before


def test_a_host_holds_whole_groups_and_transfers_cross_hosts_as_before() -> None:
    found = a100(16)
    hosts = tuple(replace(host, adapter_bandwidth=8e9) for host in found.hosts)
    cluster = replace(found, hosts=hosts)
    split = split_cluster(cluster, 4)
    assert [host.num_devices for host in split.hosts] == [2, 2]
    assert split.network == cluster.network
    assert [host.adapter_bandwidth for host in split.hosts] == [2e9, 2e9]
    assert split_cluster(found, 4).hosts[0].adapter_bandwidth is None
    assert split_cluster(cluster, 1) is cluster
    with pytest.raises(UsageError, match="tensor degree 3 does not divide the 8 devices of host 0"):
        split_cluster(cluster, 3)


def test_heads_limit_the_degree(model_path: Path) -> None:
    graph, profile = measured(model_path)
    with pytest.raises(UsageError, match="tensor degree 8 does not divide the 4 pieces"):
        predict(graph, profile, a100(8), Configuration(tensor_degree=8, micro_batch_size=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensor_degree": 0}, "tensor degree is 0"),
        ({"num_replicas": 3}, "3 replicas x 2 pipeline ranks x tensor degree 1 need 6 devices"),
        ({"micro_batch_size": 1}, "micro-batches have 1 samples, the graph's 2"),
        ({"schedule": Schedule.ONE_F_ONE_B}, "2 stages per rank, but the schedule 1f1b has one"),
        ({"boundaries": (0, 4, 4, 6, 8)}, "do not split 8 layers into 4 stages"),
        ({"stages_per_rank": 5}, "5 stages per rank x 2 pipeline ranks = 10 stages"),
    ],
)
def test_contradictions_are_refused(
    model_path: Path, change: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        predict(*measured(model_path), a100(4), replace(BASE, **change))  # type: ignore[arg-type]


def test_what_does_not_fit_is_predicted_and_comes_last(model_path: Path) -> None:
    graph, profile = measured(model_path)
    found = [
        predict(
            graph,
            profile,
            a100(4),
            replace(BASE, num_micro_batches=count),
            memory_limit_bytes=limit,
        )
        for count, limit in ((3, 10**4), (2, 10**9), (1, 10**9))
    ]
    assert found[0].missing_bytes == found[0].peak_bytes - 10**4 > 0
    assert ranked(found) == [found[2], found[1], found[0]]


def test_mixed_precision_keeps_masters(model_path: Path) -> None:
    traced = trace(load_model_file(str(model_path)), Precision.BFLOAT16)
    graph, profile = traced.layer_graph(2), with_splits(traced, measure(traced, 2))
    choice = Configuration(tensor_degree=2, micro_batch_size=2)
    mixed = predict(graph, profile, a100(2), choice, precision=Precision.BFLOAT16).memory[0]
    single = predict(*measured(model_path), a100(2), choice).memory[0]
    # 4 bytes of master and 2 of the copy; sums and moments in float32 as before.
    assert mixed.weights == pytest.approx(1.5 * single.weights, rel=0.01)
    assert (mixed.gradients, mixed.optimizer) == (single.gradients, single.optimizer)
    assert mixed.activations < 0.6 * single.activations


def test_all_configurations_use_all_devices() -> None:
    found = list(
        configurations(
            16, devices_per_host=8, num_layers=8, global_batch_size=32,
            schedules=(Schedule.LAYERED, Schedule.ONE_F_ONE_B), recompute=(False, True),
        )
    )  # fmt: skip
    assert len(set(found)) == len(found)
    meshes = {(c.num_replicas, c.num_pipeline_ranks, c.tensor_degree) for c in found}
    expected = {
        (16 // ranks // tensor, ranks, tensor)
        for tensor in (1, 2, 4, 8)
        for ranks in (1, 2, 4, 8)
        if 16 % (ranks * tensor) == 0
    }
    assert meshes == expected
    assert {c.global_batch_size for c in found} == {32}
    assert all(c.num_devices == 16 for c in found)
    assert all(c.num_pipeline_ranks * c.stages_per_rank <= 8 for c in found)


def test_the_command_prints_one_configuration(model_path: Path) -> None:
    result = run(
        predict_command, str(model_path), "--gpus", "8", "--cluster", "a100-80", "--tensor", "2",
        "--pipeline-ranks", "2", "--micro-batches", "4", "--schedule", "1f1b", "--recompute",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("2 replicas x 2 pipeline ranks x tensor degree 2; 1f1b", "with recompute",
                  "does not execute tensor parallelism", "tensor", "optimizer"):  # fmt: skip
        assert words in result.output


def test_the_command_compares(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    result = run(
        predict_command, str(model_path), "--gpus", "8", "--cluster", "a100-80", "--compare",
        "--batch-size", "16", "--no-recompute", "--memory-limit", "3.5MB", "--output", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "OUT OF MEMORY by" in result.output
    assert "tensor degree 8 does not divide the 4 pieces" in result.output
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["tensor_degree"] for row in rows} == {"1", "2", "4"}
    assert len(rows) > 5
    keys = [(int(row["missing_bytes"]), float(row["step_seconds"])) for row in rows]
    assert keys == sorted(keys)
    assert keys[0][0] == 0 < keys[-1][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor", "3"], "no combination of the given values uses all 8 devices"),
        (["--tensor", "8"], "tensor degree 8 does not divide the 4 pieces"),
        (["--tensor", "two"], "'two' is not a valid integer"),
        (["--schedule", "fast"], "'fast' is not one of"),
        (["--micro-batch-size", "3", "--batch-size", "16"], "with a batch of 16 samples"),
        (["--output", "nowhere/table.csv"], "there is no folder nowhere"),
    ],
)
def test_the_command_refuses(
    model_path: Path, arguments: list[str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = run(
        predict_command, str(model_path), "--gpus", "8", "--cluster", "a100-80", *arguments
    )
    assert result.exit_code == 2
    assert words in result.output
    assert list(tmp_path.iterdir()) == []
