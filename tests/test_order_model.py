"""Estimates of other schedules against the simulator: time, memory held, and what they choose."""

import random
from dataclasses import replace
from typing import Any

import pytest
from synthetic import chain_cluster, chain_graph, chain_profile

from planner.explain.alternating import search_schedule
from planner.explain.order_model import OrderModel, model_of, num_held, quick_seconds
from planner.graph import LayerGraph
from planner.host_memory import simulated_of
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.types import Split

NUM_LAYERS = 12
SAVED_BYTES = 1000
SHAPES = [
    (Schedule.ONE_F_ONE_B, 3, 1, 7, 0),
    (Schedule.ONE_F_ONE_B, 4, 1, 2, 0),
    (Schedule.GPIPE, 3, 1, 5, 0),
    (Schedule.ZERO_BUBBLE, 3, 1, 6, 0),
    (Schedule.INTERLEAVED, 2, 3, 4, 0),
    (Schedule.INTERLEAVED, 3, 2, 9, 0),
    (Schedule.HYBRID, 2, 2, 8, 4),
    (Schedule.HYBRID, 3, 2, 6, 6),
]
"""Schedule, ranks, stages per rank, micro-batches and group size."""


def problem_of(num_ranks: int, count: int, seed: int = 0, **cluster: Any) -> Problem:
    """Layers of unlike cost in both directions, on ranks with free links unless told otherwise."""
    draw = random.Random(seed)
    forward = [draw.uniform(0.5, 2.0) for _ in range(NUM_LAYERS)]
    backward = [draw.uniform(1.0, 4.0) for _ in range(NUM_LAYERS)]

    def graph_at(size: int) -> LayerGraph:
        return chain_graph(NUM_LAYERS, micro_batch_size=size)

    return Problem(
        graph_at=graph_at,
        profile_at=lambda size: chain_profile(
            graph_at(size),
            forward_seconds=forward,
            backward_seconds=backward,
            saved_bytes=SAVED_BYTES * size,
        ),
        cluster=chain_cluster(num_ranks, **cluster),
        num_devices=num_ranks,
        global_batch_size=count,
        constraints=Constraints(num_replicas=1, num_pipeline_ranks=num_ranks, micro_batch_size=1),
        time_limit_seconds=20.0,
    )


def choice_of(num_ranks: int, loops: int, count: int) -> Choice:
    return Choice(
        num_replicas=1, num_pipeline_ranks=num_ranks, stages_per_rank=loops, micro_batch_size=1,
        num_micro_batches=count, partition=0, recompute=None,
    )  # fmt: skip


def modelled(problem: Problem, shape: tuple[Schedule, int, int, int, int]) -> OrderModel:
    schedule, num_ranks, loops, count, group_size = shape
    choice = choice_of(num_ranks, loops, count)
    return model_of(Builder(problem=problem), choice, schedule, group_size)


def simulated(problem: Problem, placement: Placement) -> Simulated:
    graph, profile = problem.graph_at(1), problem.profile_at(1)
    plan = lower(graph, profile, problem.cluster, placement, PlanOptions())
    return simulated_of(plan, simulate(plan))


def random_split(draw: random.Random, num_stages: int) -> Split:
    cuts = sorted(draw.sample(range(1, NUM_LAYERS), num_stages - 1))
    flags = tuple(draw.random() < 0.4 for _ in range(num_stages))
    return Split(boundaries=(0, *cuts, NUM_LAYERS), recompute=flags)


@pytest.mark.parametrize("shape", SHAPES)
def test_time_is_the_simulators_where_links_are_free(shape: Any) -> None:
    """Of orders that are not shortened: those that are pay for it with a percent or so."""
    schedule, num_ranks, loops, count, _ = shape
    problem, draw = problem_of(num_ranks, count), random.Random(str(shape))
    model = modelled(problem, shape)
    is_short = count <= 2 * num_ranks or schedule is Schedule.HYBRID
    for _ in range(8):
        split = random_split(draw, num_ranks * loops)
        seconds = simulated(problem, model.placement(split)).step_seconds
        assert model.seconds(split) == pytest.approx(seconds, rel=1e-4 if is_short else 0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_link_carries_one_message_at_a_time(shape: Any) -> None:
    """With transfers about as long as the compute of a stage."""
    _, num_ranks, loops, count, _ = shape
    problem = problem_of(num_ranks, count, latency_seconds=2.5)
    model, draw = modelled(problem, shape), random.Random(str(shape))
    for _ in range(8):
        split = random_split(draw, num_ranks * loops)
        seconds = simulated(problem, model.placement(split)).step_seconds
        assert model.seconds(split) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_once_simulated_is_known(shape: Any) -> None:
    """What one simulation corrects is exact for its split, and with one stage per rank it tells the
    peaks of the splits around it. Of several stages a rank holds unlike numbers of micro-batches.
    """
    schedule, num_ranks, loops, count, group_size = shape
    problem = problem_of(num_ranks, count, memory_bytes=100 * NUM_LAYERS * SAVED_BYTES)
    model = modelled(problem, shape)
    for rank in range(num_ranks):
        assert 1 <= num_held(schedule, model.choice, group_size, rank) <= count
    split = model.improved(model.simple_split()[0])
    known = model.corrected(split, simulated(problem, model.placement(split)).peak_bytes)
    around = [other for other in known.near(split, 1.3) if not any(other.recompute)]
    for other in [split, *around[: 10 if loops == 1 else 0]]:
        peaks = simulated(problem, model.placement(other)).peak_bytes
        limits = known.instance.limit_units
        for excess, limit, peak in zip(known.excess_bytes(other), limits, peaks, strict=True):
            estimate = excess + limit * known.instance.unit_bytes
            assert estimate == pytest.approx(peak, rel=1e-6 if other is split else 0.08)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_split_chosen_is_no_slower_than_any_of_many(shape: Any) -> None:
    _, num_ranks, loops, count, _ = shape
    problem, draw = problem_of(num_ranks, count), random.Random(str(shape))
    model = modelled(problem, shape)
    best = model.improved(model.simple_split()[0])
    assert not any(best.recompute)  # memory is loose
    assert max(model.excess_bytes(best)) <= 0
    seconds = simulated(problem, model.placement(best)).step_seconds
    others = [random_split(draw, num_ranks * loops) for _ in range(30)]
    least = min(simulated(problem, model.placement(split)).step_seconds for split in others)
    assert seconds <= least * (1 + 1e-6)
    near = model.near(best, 1.05)
    assert best not in near
    assert all(model.seconds(split) <= 1.05 * model.seconds(best) * (1 + 1e-9) for split in near)


@pytest.mark.parametrize("shape", SHAPES)
def test_short_memory_moves_layers_and_recomputes(shape: Any) -> None:
    """What is found fits, and a rank that may hold less has less, or recomputes."""
    schedule, num_ranks, _, count, _ = shape
    problem = problem_of(num_ranks, count)
    roomy, fast = search_schedule(problem, lambda p: simulated(problem, p), schedule)
    peak = max(simulated(problem, roomy).peak_bytes)
    tight = problem_of(num_ranks, count, memory_bytes=int(0.8 * peak))
    found, slow = search_schedule(tight, lambda p: simulated(tight, p), schedule)
    assert max(simulated(tight, found).peak_bytes) <= 0.8 * peak
    assert simulated(tight, found).step_seconds == slow >= fast
    assert simulated(problem, roomy).step_seconds == fast


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_estimate_is_near_the_best_split(shape: Any) -> None:
    """It decides only who is asked first."""
    schedule, num_ranks, _, count, _ = shape
    problem = problem_of(num_ranks, count)
    model = modelled(problem, shape)
    quick = quick_seconds(Builder(problem=problem).instance(model.choice), schedule)
    assert quick == pytest.approx(model.seconds(model.improved(model.simple_split()[0])), rel=0.3)


def test_a_rank_of_less_memory_holds_less() -> None:
    problem = problem_of(2, 16, devices_per_host=1)
    roomy, fast = search_schedule(problem, lambda p: simulated(problem, p), Schedule.ONE_F_ONE_B)
    first, second = problem.cluster.hosts
    small = int(0.6 * simulated(problem, roomy).peak_bytes[0])
    less = replace(first, device=replace(first.device, name="small", memory_bytes=small))
    uneven = replace(problem, cluster=replace(problem.cluster, hosts=(less, second)))
    found, slow = search_schedule(uneven, lambda p: simulated(uneven, p), Schedule.ONE_F_ONE_B)
    assert simulated(uneven, found).peak_bytes[0] <= small
    assert found.recompute[0] or found.boundaries[1] < roomy.boundaries[1]
    assert not found.recompute[1]
    assert fast < slow < 1.5 * fast
