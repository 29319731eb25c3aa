"""The whole search: what it returns, what it refuses, and why."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solve_chain import Layer, choice_of, formula, make_cluster, make_problem

from planner.errors import InfeasibleError, UsageError
from planner.solve import Placement, Problem, Simulated, Solution, solve
from planner.solve.build import Builder
from planner.solve.choices import Choice, mesh_groups
from planner.solve.instance import rank_units, step_ticks


def uneven(num_layers: int, seed: int = 0) -> list[Layer]:
    generator = random.Random(seed)
    return [
        Layer(
            forward_seconds=generator.uniform(5e-4, 2e-3),
            backward_seconds=generator.uniform(1e-3, 4e-3),
            num_elements=generator.randrange(1_000, 100_000),
            saved_bytes=generator.randrange(1_000, 50_000),
        )
        for _ in range(num_layers)
    ]


def check_valid(problem: Problem, placement: Placement, num_layers: int) -> None:
    wanted = problem.constraints
    assert placement.boundaries[0] == 0
    assert placement.boundaries[-1] == num_layers
    assert all(a < b for a, b in itertools.pairwise(placement.boundaries))
    assert placement.num_stages == len(placement.boundaries) - 1
    stage_ranks, ranks = placement.stage_ranks, placement.num_pipeline_ranks
    assert set(stage_ranks) == set(range(ranks))
    if problem.constraints.stages_per_rank is not None:
        assert stage_ranks == tuple(range(ranks)) * problem.constraints.stages_per_rank
    assert ranks == 1 or all(one != other for one, other in itertools.pairwise(stage_ranks))
    assert placement.global_batch_size == problem.global_batch_size
    assert placement.world_size <= problem.num_devices
    assert len(placement.recompute) == placement.num_stages
    assert placement.partition == 0 or (placement.partition <= 3 and placement.num_replicas > 1)
    for name in dataclasses.asdict(wanted):
        demanded = getattr(wanted, name)
        if demanded is not None and name not in ("stages_per_rank", "recompute"):
            assert getattr(placement, name) == demanded


def accepts_all(size: int) -> bool:
    return size > 0


def brute_force(problem: Problem, num_layers: int) -> float:
    """Least objective over all choices that use all devices, and all splits that fit."""
    builder, best = Builder(problem=problem), math.inf
    for choice in next(mesh_groups(problem, num_layers, accepts=accepts_all)):
        instance = builder.instance(choice)
        for cuts in itertools.combinations(range(1, num_layers), choice.num_stages - 1):
            split = choice.split((0, *cuts, num_layers))
            units = rank_units(instance, split)
            if all(u <= limit for u, limit in zip(units, instance.limit_units, strict=True)):
                best = min(best, step_ticks(instance, split) * instance.tick_seconds)
    return best


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 7])
def test_search_finds_the_best_of_all_choices(num_devices: int, num_layers: int) -> None:
    problem = make_problem(
        uneven(num_layers, seed=num_layers), num_devices=num_devices, global_batch_size=12
    )
    solution = solve(problem, formula(problem))
    check_valid(problem, solution.placement, num_layers)
    best = brute_force(problem, num_layers)
    # The search knows more pools, partitions and numbers of devices than this brute force, but
    # leaves a space of this size where no bound is lower by more than a ten-thousandth.
    assert solution.step_seconds <= best * (1 + 2e-4)
    assert solution.objective_seconds == pytest.approx(solution.step_seconds, rel=1e-6)
    assert solution.bound_seconds <= solution.step_seconds
    assert 0.0 <= solution.gap < 0.1


def test_size_one() -> None:
    problem = make_problem([Layer()], num_devices=1, global_batch_size=1)
    solution = solve(problem, formula(problem))
    assert solution.placement == Placement(
        num_replicas=1,
        num_pipeline_ranks=1,
        boundaries=(0, 1),
        stage_ranks=(0,),
        micro_batch_size=1,
        num_micro_batches=1,
        partition=0,
        recompute=(False,),
        num_weight_buffers=1,
        num_gradient_buffers=1,
    )
    assert solution.gap == 0.0
    assert solution.uniform_seconds == solution.greedy_seconds == solution.step_seconds


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_placement_is_valid(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 12))
    num_devices = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    ranks = data.draw(st.sampled_from([None, *range(1, min(num_devices, num_layers) + 1)]))
    stages = data.draw(st.sampled_from([None, *range(1, num_layers // (ranks or 1) + 1)]))
    replicas = data.draw(st.sampled_from([None, *range(1, num_devices // (ranks or 1) + 1)]))
    size = data.draw(st.sampled_from([None, 1, 2]))
    count = data.draw(st.sampled_from([None, 1, 3]))
    batch = data.draw(st.integers(1, 4)) * (replicas or 1) * (size or 1) * (count or 1)
    if None not in (replicas, size, count):
        batch = (replicas or 1) * (size or 1) * (count or 1)
    problem = make_problem(
        uneven(num_layers, seed=data.draw(st.integers(0, 99))),
        num_devices=num_devices,
        global_batch_size=batch,
        num_replicas=replicas,
        num_pipeline_ranks=ranks,
        stages_per_rank=stages,
        micro_batch_size=size,
        num_micro_batches=count,
        recompute=data.draw(st.sampled_from([None, True, False])),
    )
    try:
        solution = solve(problem, formula(problem))
    except UsageError:
        # Demands may contradict each other over any mesh of these devices.
        assert ranks is None or replicas is None
        return
    check_valid(problem, solution.placement, num_layers)
    assert solution.bound_seconds <= solution.objective_seconds
    assert [c.verdict for c in solution.candidates].count("best") == 1


def test_same_question_same_answer() -> None:
    problem = make_problem(uneven(12), num_devices=4, global_batch_size=16)
    one, other = (solve(problem, formula(problem)) for _ in range(2))
    assert dataclasses.replace(one, solve_seconds=0.0) == dataclasses.replace(
        other, solve_seconds=0.0
    )


def test_never_worse_than_simple_splits() -> None:
    """Even where the simulator disagrees with the solver's step-time model."""
    layers = uneven(9, seed=4)
    problem = make_problem(layers, num_devices=3, num_pipeline_ranks=3, stages_per_rank=1)
    exact = formula(problem)

    def simulate(placement: Placement) -> Simulated:
        simulated = exact(placement)
        if placement.boundaries == (0, 3, 6, 9):
            return dataclasses.replace(simulated, step_seconds=simulated.step_seconds / 10)
        return simulated

    solution = solve(problem, simulate)
    assert solution.placement.boundaries == (0, 3, 6, 9)
    assert solution.step_seconds == solution.uniform_seconds
    assert solution.greedy_seconds is not None
    assert solution.greedy_seconds > solution.step_seconds
    assert solution.bound_seconds <= solution.step_seconds


def test_simple_splits_that_do_not_fit_are_none() -> None:
    """A split that the memory model accepts, and a limit that the equal split exceeds."""
    layers = [Layer(num_elements=10**6), *[Layer(num_elements=10) for _ in range(5)]]
    layers[1] = Layer(num_elements=10**6)
    problem = make_problem(
        layers,
        num_devices=2,
        num_pipeline_ranks=2,
        stages_per_rank=1,
        memory_limit_bytes=20 * 10**6,
    )
    solution = solve(problem, formula(problem))
    assert solution.placement.boundaries == (0, 1, 6)
    assert solution.uniform_seconds is None


def peaks_raised(problem: Problem, excess_bytes: int) -> Callable[[Placement], Simulated]:
    return formula(problem, excess_bytes=excess_bytes)


def test_simulated_peak_above_the_model_is_respected() -> None:
    """The model says that the whole model fits one stage; the simulator wants more room."""
    layers = uneven(8)
    free = make_problem(layers, num_devices=2, num_pipeline_ranks=2, memory_limit_bytes=10**8)
    loose = solve(free, formula(free))
    peak = max(formula(free)(loose.placement).peak_bytes)
    problem = dataclasses.replace(free, memory_limit_bytes=peak + 1000)
    simulate = peaks_raised(problem, 50_000)
    solution = solve(problem, simulate)
    assert max(simulate(solution.placement).peak_bytes) <= peak + 1000
    assert solution.placement != loose.placement


def test_recompute_where_memory_is_tight() -> None:
    layers = [Layer(saved_bytes=10**6, output_elements=10, num_elements=10)] * 6
    plenty = make_problem(layers, num_devices=2, micro_batch_size=1)
    tight = dataclasses.replace(plenty, memory_limit_bytes=4 * 10**6)
    assert not any(solve(plenty, formula(plenty)).placement.recompute)
    assert all(solve(tight, formula(tight)).placement.recompute)


def test_partition_where_memory_is_tight() -> None:
    layers = [Layer(num_elements=10**6, saved_bytes=10)] * 6
    problem = make_problem(
        layers, num_devices=4, num_replicas=4, memory_limit_bytes=60 * 10**6, global_batch_size=8
    )
    solution = solve(problem, formula(problem))
    assert solution.placement.partition > 0
    whole = dataclasses.replace(problem.constraints, partition=0, offload_state=False)
    with pytest.raises(InfeasibleError):
        solve(dataclasses.replace(problem, constraints=whole), formula(problem))


def test_fewer_devices_where_all_cannot_be_used() -> None:
    problem = make_problem(uneven(3), num_devices=7, global_batch_size=3)
    solution = solve(problem, formula(problem))
    check_valid(problem, solution.placement, 3)
    assert solution.placement.world_size in (3, 6)


@pytest.mark.parametrize("limit", [-1, 0, 1, 10_000])
def test_impossible_limit_never_returns_a_plan(limit: int) -> None:
    problem = make_problem(uneven(6), num_devices=4, memory_limit_bytes=limit)
    with pytest.raises(InfeasibleError, match="pipeline rank") as caught:
        solve(problem, formula(problem))
    assert "state" in caught.value.message
    assert "the limit is" in caught.value.message
    assert caught.value.hint


def test_simulated_excess_is_part_of_the_explanation() -> None:
    problem = make_problem(uneven(6), num_devices=2, memory_limit_bytes=10**8)
    with pytest.raises(InfeasibleError, match="found by the simulator"):
        solve(problem, peaks_raised(problem, 10**9))


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ({"num_devices": 0, "cluster": make_cluster(1)}, ["devices", "0"]),
        ({"num_devices": 3, "cluster": make_cluster(2)}, ["3 devices", "2"]),
        ({"num_devices": 8, "num_pipeline_ranks": 7}, ["7 pipeline ranks", "6 layers"]),
        ({"num_devices": 2, "num_pipeline_ranks": 2, "stages_per_rank": 4}, ["8 stages", "6"]),
        ({"num_devices": 2, "num_pipeline_ranks": 4}, ["4 devices", "2"]),
        ({"num_devices": 4, "num_replicas": 3, "global_batch_size": 8}, ["8", "replicas 3"]),
        ({"micro_batch_size": 3, "global_batch_size": 8}, ["8 samples", "micro-batch size 3"]),
        (
            {"num_replicas": 1, "micro_batch_size": 1, "num_micro_batches": 4},
            ["8 samples", "micro-batches 4"],
        ),
        ({"micro_batch_size": 0}, ["micro-batch size", "0"]),
        ({"num_micro_batches": -1}, ["micro-batches", "-1"]),
        ({"global_batch_size": 0}, ["batch", "0"]),
        ({"partition": 4}, ["partition", "4"]),
        ({"partition": 3}, ["no mesh", "partition"]),
    ],
)
def test_contradictions(arguments: dict[str, int], values: list[str]) -> None:
    problem = make_problem(uneven(6), **arguments)
    with pytest.raises(UsageError) as caught:
        solve(problem, formula(problem))
    assert all(value in caught.value.message for value in values), caught.value.message
    assert caught.value.hint


def test_mixed_devices_use_the_smallest_memory() -> None:
    """The second host's devices are small: what their ranks hold must fit there."""
    layers = [Layer(num_elements=10**5, saved_bytes=10)] * 8
    big = make_cluster(2)
    small_host = make_cluster(2, memory_bytes=4 * 10**6).hosts[0]
    cluster = dataclasses.replace(big, hosts=(*big.hosts, small_host))
    problem = make_problem(layers, num_devices=4, num_pipeline_ranks=4, cluster=cluster)
    solution = solve(problem, formula(problem))
    peaks = formula(problem)(solution.placement).peak_bytes
    assert max(peaks[2:]) <= 4 * 10**6


def hard_problem(num_layers: int, num_devices: int, hosts: int) -> Problem:
    layers = uneven(num_layers, seed=9)
    layers[0] = Layer(forward_seconds=1e-5, backward_seconds=1e-5, num_elements=10**6)
    layers[-1] = Layer(forward_seconds=3e-3, backward_seconds=6e-3, num_elements=10**6)
    return make_problem(
        layers,
        num_devices=num_devices,
        global_batch_size=4 * num_devices,
        cluster=make_cluster(num_devices, num_hosts=hosts, bandwidth=1e10),
        time_limit_seconds=6.0,
    )


def small_gap(solution: Solution) -> bool:
    return solution.bound_seconds <= solution.objective_seconds and solution.gap < 0.05


@pytest.mark.parametrize(("num_layers", "num_devices", "hosts"), [(15, 8, 1), (82, 64, 8)])
def test_realistic_sizes(num_layers: int, num_devices: int, hosts: int) -> None:
    problem = hard_problem(num_layers, num_devices, hosts)
    solution = solve(problem, formula(problem))
    check_valid(problem, solution.placement, num_layers)
    assert small_gap(solution)
    for simple in (solution.uniform_seconds, solution.greedy_seconds):
        assert simple is None or solution.step_seconds <= simple


def test_time_limit_still_answers() -> None:
    problem = dataclasses.replace(hard_problem(40, 16, 2), time_limit_seconds=0.01)
    solution = solve(problem, formula(problem))
    check_valid(problem, solution.placement, 40)
    assert isinstance(choice_of(solution.placement), Choice)
    assert solution.bound_seconds <= solution.objective_seconds


def test_bound_is_not_above_a_simulation_that_is_faster_than_the_model() -> None:
    problem = make_problem(uneven(9), num_devices=2, global_batch_size=8)
    exact = formula(problem)

    def simulate(placement: Placement) -> Simulated:
        simulated = exact(placement)
        return dataclasses.replace(simulated, step_seconds=0.9 * simulated.step_seconds)

    solution = solve(problem, simulate)
    assert solution.bound_seconds <= solution.step_seconds
    simulated = [c for c in solution.candidates if c.step_seconds is not None]
    assert simulated
    assert all(c.bound_seconds <= (c.step_seconds or 0.0) for c in simulated)
