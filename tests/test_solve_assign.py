"""Stages on other ranks than s mod P: where they pay, and that nothing else changes."""

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import command
from exhaustive import best_seconds, random_problem, simulator
from solve_chain import Layer, choice_of, make_cluster, make_problem, split_of
from test_solve_simulated import EXACT, work

from planner.cli.plan import main as lga_plan
from planner.cluster.types import Cluster, Host
from planner.plan.file import read_plan
from planner.profile import Profile
from planner.solve import Problem, Solution, solve
from planner.solve.assign import assigned, assignments
from planner.solve.bounds import least_step_ticks
from planner.solve.build import Builder
from planner.solve.instance import rank_units, step_ticks
from planner.solve.recompute import choose_recompute

BLOCK = Layer(num_elements=10**4, saved_bytes=0)


def both(problem: Problem) -> tuple[Solution, Solution]:
    """With stage s on rank s mod P, and with stages on any ranks."""
    wanted = replace(problem.constraints, modular=True)
    modular = solve(replace(problem, constraints=wanted), simulator(problem))
    ranks, stages = modular.placement.num_pipeline_ranks, modular.placement.num_stages
    assert modular.placement.stage_ranks == tuple(range(ranks)) * (stages // ranks)
    assert modular.modular_seconds is None
    return modular, solve(problem, simulator(problem))


def test_ends_that_share_weights_are_on_one_rank() -> None:
    embedding = replace(BLOCK, num_elements=2 * 10**6, forward_seconds=5e-4, backward_seconds=1e-3)
    layers = [embedding, *[BLOCK] * 10, replace(BLOCK, shares_first=True)]
    problem = make_problem(
        layers, num_devices=3, num_pipeline_ranks=3, num_replicas=1, global_batch_size=6
    )
    modular, found = both(problem)
    assert solve(problem, simulator(problem)).placement == found.placement
    ranks = found.placement.stage_ranks
    assert ranks[0] == ranks[-1]
    assert found.step_seconds < modular.step_seconds * 0.98
    # The certificate is that of the rule.
    assert found.modular_seconds == pytest.approx(modular.step_seconds)
    assert found.certified_seconds == found.modular_seconds
    assert found.bound_seconds <= found.modular_seconds


def unequal(flops: float) -> Cluster:
    """Two fast devices and two slow ones of one host's links."""
    cluster = make_cluster(4, bandwidth=1e10)
    host = cluster.hosts[0]
    slow = replace(host.device, name="slow device", peak_flops={"float32": flops})
    hosts = (replace(host, num_devices=2), Host(device=slow, num_devices=2, link=host.link))
    return replace(cluster, hosts=hosts, network=host.link)


def test_slow_ranks_have_fewer_stages() -> None:
    problem = make_problem(
        [BLOCK] * 16, cluster=unequal(7e11), num_devices=4, num_pipeline_ranks=4,
        global_batch_size=8, micro_batch_size=1,
    )  # fmt: skip

    def profile_at(size: int) -> Profile:
        layers = (
            replace(
                layer,
                forward=work(1e-3 * size),
                backward=work(2e-3 * size),
                forward_seconds=None,
                backward_seconds=None,
            )
            for layer in make_problem([BLOCK] * 16).profile_at(size).layers
        )
        return Profile(micro_batch_size=size, layers=tuple(layers))

    modular, found = both(replace(problem, profile_at=profile_at))
    ranks = found.placement.stage_ranks
    assert max(map(ranks.count, (2, 3))) < max(map(ranks.count, (0, 1)))
    assert found.step_seconds < modular.step_seconds * 0.98


def test_a_head_of_five_blocks_has_a_stage_of_its_own_making() -> None:
    head = replace(BLOCK, forward_seconds=5e-3, backward_seconds=1e-2)
    problem = make_problem(
        [*[BLOCK] * 16, head], num_devices=4, num_pipeline_ranks=4, global_batch_size=16,
        micro_batch_size=1, recompute=False,
    )  # fmt: skip
    modular, found = both(problem)
    assert found.step_seconds < modular.step_seconds * 0.95
    demanded = replace(problem.constraints, stages_per_rank=2)
    placement = solve(replace(problem, constraints=demanded), simulator(problem)).placement
    assert placement.stage_ranks == (0, 1, 2, 3) * 2


@pytest.mark.parametrize("seed", range(5))
def test_optimum_of_small_problems(seed: int) -> None:
    check(seed, max_placements=120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 250))
def test_optimum_of_many_small_problems(seed: int) -> None:
    check(seed, max_placements=1000)


def check(seed: int, max_placements: int) -> None:
    """Every placement with stages on any ranks: the search equals the best of them."""
    small = random_problem(seed, max_placements, assigned=True)
    best, simulated = best_seconds(small), simulator(small.problem)
    if best == float("inf"):
        return
    found = solve(small.problem, simulated)
    assert found.placement in small.simulated
    assert found.step_seconds <= best * (1 + 1e-9)
    assert found.bound_seconds <= found.certified_seconds * (1 + 1e-9)
    if found.modular_seconds is not None:
        assert found.step_seconds < found.modular_seconds


@pytest.mark.parametrize("seed", range(4))
def test_model_and_bound_of_any_assignment(seed: int) -> None:
    """Neither is slower than the simulator, nor the bound above the model."""
    small = random_problem(seed, 60, assigned=True)
    builder = Builder(problem=small.problem)
    for placement, simulated in small.simulated.items():
        instance, split = builder.instance(choice_of(placement)), split_of(placement)
        ticks = step_ticks(instance, split)
        assert least_step_ticks(instance) <= ticks
        assert ticks * instance.tick_seconds <= simulated.step_seconds * (1 + EXACT)


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (3, 1), (4, 2), (5, 3), (6, 4)])
def test_every_assignment_once(stages: int, ranks: int) -> None:
    everyone = {
        found
        for found in itertools.product(range(ranks), repeat=stages)
        if len(set(found)) == ranks
        and (ranks == 1 or all(one != other for one, other in itertools.pairwise(found)))
    }
    found = list(assignments(stages, ranks, alike=False))
    assert len(found) == len(set(found))
    assert set(found) == everyone
    named = {tuple(dict.fromkeys(one).keys()) for one in assignments(stages, ranks, alike=True)}
    assert named == {tuple(range(ranks))}
    assert len(list(assignments(stages, ranks, alike=True))) * _factorial(ranks) == len(found)


def _factorial(number: int) -> int:
    return 1 if number < 2 else number * _factorial(number - 1)


def test_recompute_is_as_little_as_memory_asks_for_on_any_ranks() -> None:
    """Of uneven numbers of stages: within the limits, and none can be left out."""
    generator = random.Random(0)
    layers = [replace(BLOCK, saved_bytes=generator.randrange(10**4, 10**6)) for _ in range(9)]
    problem = make_problem(layers, num_devices=3, num_pipeline_ranks=3, micro_batch_size=1)
    choice = choice_of(solve(problem, simulator(problem)).placement)
    choice = assigned(replace(choice, recompute=None), (0, 1, 2, 0, 2, 1, 2))
    cuts = (0, 1, 3, 4, 5, 6, 8, 9)
    loose = Builder(problem=problem).instance(choice)
    most = rank_units(loose, choice.split(cuts))
    always = replace(choice.split(cuts), recompute=(True,) * 7)
    least = rank_units(loose, always)
    for share in (0.2, 0.5, 0.8):
        limits = [low + round(share * (high - low)) for low, high in zip(least, most, strict=True)]
        instance = replace(loose, limit_units=tuple(limits))
        split = choose_recompute(instance, cuts)
        assert any(split.recompute)
        assert all(
            used <= limit for used, limit in zip(rank_units(instance, split), limits, strict=True)
        )


MODEL = """
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3000, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 3000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)

def build_model():
    return Language()

def example_batch(batch_size):
    tokens = torch.randint(0, 3000, (batch_size, 9))
    return {"tokens": tokens[:, :-1], "next": tokens[:, 1:]}

def loss_fn(output, batch):
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["next"].flatten())
"""
CLUSTER = """
name: two slow links
hosts: [{count: 2, device: v100-32, link: {name: bus, bandwidth: 2e8, latency_seconds: 5e-6}}]
network: loopback
backend: gloo
"""


def test_a_tied_head_is_planned_beside_its_embedding_and_trains_the_same(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    words = (
        f"{tmp_path / 'model.py'} --gpus 2 --pipeline-ranks 2 --schedule layered --micro-batches 4 "
        f"--global-batch 8 --cluster {tmp_path / 'cluster.yaml'} --time-limit 5 "
        f"--output {tmp_path / 'a.plan.yaml'}"
    ).split()
    result = CliRunner().invoke(lga_plan, words)
    assert result.exit_code == 0, result.output
    stages = read_plan(tmp_path / "a.plan.yaml").stages
    assert stages[0].rank == stages[-1].rank
    modular = re.search(r"stage s on rank s mod P takes .*, this one -([\d.]+)%", result.output)
    assert modular is not None, result.output
    assert float(modular[1]) > 10
    ran = command(tmp_path, "lga-run", "a.plan.yaml", "model.py", "--verify", "--steps", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "verify: passed" in ran.stdout
