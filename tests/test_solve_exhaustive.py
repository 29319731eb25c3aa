"""The search against every placement there is."""

import math

import pytest
from exhaustive import Small, best_seconds, random_problem, simulator

from planner.errors import InfeasibleError
from planner.solve import solve

CLOSE = 1 + 1e-9


def check(small: Small) -> None:
    best = best_seconds(small)
    simulate_placement = simulator(small.problem)
    if best == math.inf:
        with pytest.raises(InfeasibleError):
            solve(small.problem, simulate_placement)
        return
    solution = solve(small.problem, simulate_placement)
    assert solution.placement in small.simulated
    assert solution.step_seconds <= best * CLOSE
    assert solution.bound_seconds <= best_seconds(small, modular=True) * CLOSE
    assert solution.step_seconds == simulate_placement(solution.placement).step_seconds


@pytest.mark.parametrize("seed", range(15))
def test_optimum_of_small_problems(seed: int) -> None:
    check(random_problem(seed, max_placements=150))


@pytest.mark.parametrize("seed", range(12))
def test_optimum_of_small_problems_in_groups(seed: int) -> None:
    small = random_problem(seed, max_placements=300, grouped=True)
    assert {placement.partition_group_size for placement in small.simulated} <= {0, 2}
    check(small)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_optimum_of_many_small_problems_in_groups(seed: int) -> None:
    check(random_problem(seed, max_placements=600, grouped=True))


@pytest.mark.parametrize("seed", range(8))
def test_optimum_with_updates_on_the_host(seed: int) -> None:
    check(random_problem(seed, max_placements=150, on_host=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400))
def test_optimum_of_many_small_problems(seed: int) -> None:
    check(random_problem(seed, max_placements=1200))
