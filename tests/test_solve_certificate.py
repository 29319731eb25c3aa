"""What a solution claims: a balanced split, a bound, progress on the way to it."""

import itertools

import pytest
from solve_chain import Layer, formula, make_problem

from planner.solve import solve


@pytest.mark.parametrize(("num_blocks", "num_ranks"), [(12, 4), (23, 3), (40, 8)])
def test_a_head_of_five_blocks_is_balanced_within_a_layer(num_blocks: int, num_ranks: int) -> None:
    block = Layer(forward_seconds=1e-3, backward_seconds=2e-3, num_elements=10)
    head = Layer(forward_seconds=5e-3, backward_seconds=10e-3, num_elements=10)
    problem = make_problem(
        [block] * num_blocks + [head],
        num_devices=num_ranks,
        num_pipeline_ranks=num_ranks,
        global_batch_size=4 * num_ranks,
        micro_batch_size=1,
        recompute=False,
    )
    placement = solve(problem, formula(problem)).placement
    seconds = [3e-3] * num_blocks + [15e-3]
    work = [0.0] * num_ranks
    for rank, (first, end) in zip(
        placement.stage_ranks, itertools.pairwise(placement.boundaries), strict=True
    ):
        work[rank] += sum(seconds[first:end])
    ideal = max(sum(seconds) / num_ranks, 15e-3)
    assert max(work) <= ideal + 3e-3 + 1e-9


def test_progress_is_told_with_rising_bounds_and_falling_steps() -> None:
    problem = make_problem([Layer()] * 9, num_devices=4, global_batch_size=16)
    heard: list[tuple[int, int, float, float]] = []
    solution = solve(problem, formula(problem), lambda *told: heard.append(told))
    assert heard
    done, total, best, bound = zip(*heard, strict=True)
    assert all(0 <= number <= whole for number, whole in zip(done, total, strict=True))
    assert list(best) == sorted(best, reverse=True)
    assert list(bound) == sorted(bound)
    assert solution.step_seconds <= best[-1]
    assert solution.bound_seconds <= solution.step_seconds


def test_more_devices_never_make_a_slower_plan() -> None:
    layers = [Layer(forward_seconds=1e-3 * (1 + index % 3)) for index in range(6)]
    steps = []
    for num_devices in (1, 2, 3, 4):
        problem = make_problem(layers, num_devices=num_devices, global_batch_size=4)
        steps.append(solve(problem, formula(problem)).step_seconds)
    assert all(after <= before * 1.0002 for before, after in itertools.pairwise(steps))
