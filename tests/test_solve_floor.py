"""What no placement of a mesh and batching undercuts, against every placement there is."""

import itertools

import numpy as np
import pytest
from exhaustive import Small, random_problem

from planner.solve import Placement
from planner.solve.branch import Branches
from planner.solve.build import Builder
from planner.solve.entry import Clock
from planner.solve.floor import least_seconds, quick_seconds
from planner.solve.floor_memory import least_cost
from planner.solve.rates import Rates
from planner.solve.sizes import Sizes
from planner.solve.space import Batching, Options

CLOSE = 1 + 1e-6


def check_floors(small: Small) -> int:
    """Each floor is at most the step of each of its placements that fits."""
    problem, limit = small.problem, small.problem.memory_limit_bytes
    assert limit is not None
    branches = Branches(
        problem=problem,
        num_layers=small.num_layers,
        sizes=Sizes(problem=problem, clock=Clock(limit_seconds=1.0)),
        builder=Builder(problem=problem),
        rates=Rates(problem=problem),
    )
    fitting = [p for p, found in small.simulated.items() if max(found.peak_bytes) <= limit]
    for placement in fitting:
        branches.rates.learn(placement.micro_batch_size)
    for placement in fitting:
        least, quick = floors_of(branches, placement)
        assert quick <= least * CLOSE
        assert least <= small.simulated[placement].step_seconds * CLOSE, placement
    return len(fitting)


def floors_of(branches: Branches, placement: Placement) -> tuple[float, float]:
    batching = Batching(
        num_replicas=placement.num_replicas,
        num_pipeline_ranks=placement.num_pipeline_ranks,
        micro_batch_size=placement.micro_batch_size,
        num_micro_batches=placement.num_micro_batches,
    )
    options = Options(
        partition=placement.partition,
        offload_state=placement.offload_state,
        offload_inputs=placement.offload_inputs,
        partition_group_size=placement.partition_group_size,
    )
    floors = branches.rates.at(batching.micro_batch_size)
    whole = branches.surroundings(batching)
    around = branches.surroundings(batching, options.partition_group_size)
    return (
        least_seconds(batching, floors, around, options),
        quick_seconds(batching, floors, whole, [around]),
    )


def test_no_placement_undercuts_its_floor() -> None:
    assert sum(check_floors(random_problem(seed, max_placements=100)) for seed in range(12)) > 300


def test_no_placement_in_groups_undercuts_its_floor() -> None:
    small = (random_problem(seed, max_placements=300, grouped=True) for seed in range(12))
    assert sum(map(check_floors, small)) > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400, 600))
def test_no_placement_undercuts_its_floor_anywhere(seed: int) -> None:
    check_floors(random_problem(seed, max_placements=1000))


def test_alike_items_are_taken_whole() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        number, others = int(generator.integers(1, 7)), int(generator.integers(0, 4))
        sizes = np.concatenate([np.full(number, 3.0), generator.uniform(0.1, 6.0, others)])
        costs = np.concatenate([np.full(number, 2.0), generator.uniform(0.1, 6.0, others)])
        missing = float(generator.uniform(0.0, sizes.sum()))
        subsets = itertools.product((False, True), repeat=len(sizes))
        whole = min(
            costs[list(taken)].sum() for taken in subsets if sizes[list(taken)].sum() >= missing
        )
        assert least_cost(sizes, costs, missing) <= whole * CLOSE
        if not others:
            assert least_cost(sizes, costs, missing) == pytest.approx(whole)
