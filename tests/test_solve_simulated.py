"""The step-time and memory models against the simulator, on real lowered plans."""

import random

import pytest
from solve_chain import choice_of, make_cluster
from synthetic import chain_graph, chain_profile

from planner.graph import LayerGraph
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import Profile
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated, solve
from planner.solve.build import Builder
from planner.solve.instance import rank_units, step_ticks

NUM_LAYERS = 14


def chain_problem(
    *, num_devices: int, num_hosts: int = 1, limit: int = 2**33, **wanted: int | bool
) -> Problem:
    generator = random.Random(2)
    forward = [1e-3 * generator.uniform(0.5, 1.5) for _ in range(NUM_LAYERS)]
    forward[-1] *= 2

    def graph_at(size: int) -> LayerGraph:
        return chain_graph(NUM_LAYERS, width=20_000, num_elements=500_000, micro_batch_size=size)

    def profile_at(size: int) -> Profile:
        return chain_profile(
            graph_at(size),
            forward_seconds=[seconds * size for seconds in forward],
            backward_seconds=[2 * seconds * size for seconds in forward],
            saved_bytes=10**6 * size,
            transient_bytes=10**6 * size,
        )

    return Problem(
        graph_at=graph_at,
        profile_at=profile_at,
        cluster=make_cluster(num_devices, num_hosts=num_hosts, bandwidth=1e10),
        num_devices=num_devices,
        global_batch_size=32,
        constraints=Constraints(**wanted),  # type: ignore[arg-type]
        memory_limit_bytes=limit,
    )


def simulate_placement(problem: Problem, placement: Placement) -> Simulated:
    size = placement.micro_batch_size
    plan = lower(
        problem.graph_at(size), problem.profile_at(size), problem.cluster, placement, PlanOptions()
    )
    simulation = simulate(plan)
    return Simulated(step_seconds=simulation.step_seconds, peak_bytes=simulation.peak_bytes)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize(
    ("replicas", "ranks", "stages"), [(1, 1, 2), (1, 4, 1), (1, 4, 3), (2, 1, 4), (2, 4, 2)]
)
def test_model_agrees_with_the_simulator(
    replicas: int, ranks: int, stages: int, partition: int, recompute: bool
) -> None:
    if replicas == 1 and partition:
        partition = 0
    problem = chain_problem(
        num_devices=replicas * ranks,
        num_replicas=replicas,
        num_pipeline_ranks=ranks,
        stages_per_rank=stages,
        partition=partition,
        recompute=recompute,
    )
    builder = Builder(problem=problem)
    compared = 0

    def compare(placement: Placement) -> Simulated:
        nonlocal compared
        compared += 1
        simulated = simulate_placement(problem, placement)
        instance = builder.instance(choice_of(placement))
        seconds = step_ticks(instance, placement.boundaries) * instance.tick_seconds
        assert simulated.step_seconds == pytest.approx(seconds, rel=0.01)
        units = rank_units(instance, placement.boundaries)
        for peak, count in zip(simulated.peak_bytes, units, strict=True):
            assert peak == pytest.approx(count * instance.unit_bytes, rel=0.15)
        return simulated

    solve(problem, compare)
    assert compared >= 2


def test_answer_fits_by_the_simulator_and_beats_simple_splits() -> None:
    limit = 60 * 10**6
    problem = chain_problem(num_devices=8, num_hosts=2, limit=limit, num_pipeline_ranks=4)
    solution = solve(problem, lambda placement: simulate_placement(problem, placement))
    simulated = simulate_placement(problem, solution.placement)
    assert max(simulated.peak_bytes) <= limit
    assert solution.step_seconds == simulated.step_seconds
    assert all(solution.placement.recompute)
    for simple in (solution.uniform_seconds, solution.greedy_seconds):
        assert simple is None or solution.step_seconds < simple
