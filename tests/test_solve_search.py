"""How a search ends: interrupted, with equally fast plans, with a plan that just fits."""

from collections import Counter
from dataclasses import replace

import pytest
from planned import Chain, model_of
from solve_chain import Layer, formula, make_problem
from synthetic import chain_cluster
from torch import nn

from planner.pipeline import find_plan
from planner.prepare import prepare
from planner.report import solution_lines
from planner.solve import Placement, Simulated, solve
from planner.solve.branch import Branches
from planner.solve.build import Builder
from planner.solve.entry import Clock
from planner.solve.rates import Rates
from planner.solve.sizes import Sizes
from planner.solve.space import batchings


def interrupt(*told: float) -> None:
    """A progress listener that ends the search once there is something to keep."""
    _, _, best_seconds, _ = told
    if best_seconds < float("inf"):
        raise KeyboardInterrupt


def test_an_interrupted_search_keeps_its_best_and_its_bound() -> None:
    layers = [Layer(forward_seconds=1e-3 * (1 + index % 3)) for index in range(16)]
    problem = make_problem(layers, num_devices=4, global_batch_size=16)
    whole = solve(problem, formula(problem))
    found = solve(problem, formula(problem), interrupt)
    assert found.is_interrupted
    assert not whole.is_interrupted
    assert found.bound_seconds <= whole.step_seconds <= found.step_seconds
    assert found.bound_seconds > 0
    assert found.step_seconds == formula(problem)(found.placement).step_seconds


def test_a_search_interrupted_before_its_first_plan_has_none() -> None:
    problem = make_problem([Layer()] * 6, num_devices=2, global_batch_size=4)

    def simulate(_: Placement) -> Simulated:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(problem, simulate)


def test_a_plan_is_made_of_what_an_interrupted_search_has_found() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8), num_layers=7))
    prepared = prepare(model_file, num_devices=4, cluster=chain_cluster(4), global_batch_size=8)
    result = find_plan(prepared, interrupt)
    assert result.solution.is_interrupted
    assert not result.report.failures
    assert solution_lines(result.solution)[0].startswith("stopped")


def test_of_equally_fast_plans_the_plainest_is_taken() -> None:
    # Nothing is short of memory, and what is copied to the host costs no time.
    problem = make_problem([Layer(num_elements=10)] * 5, num_devices=1, global_batch_size=4)
    placement = solve(problem, formula(problem)).placement
    assert not placement.offload_state
    assert not placement.offload_inputs
    assert not any(placement.recompute)
    assert placement.num_stages == 1


def test_a_plan_that_just_fits_is_improved_within_the_clock() -> None:
    layers = [Layer(saved_bytes=1 << 20, num_elements=1000 * (1 + index % 3)) for index in range(9)]
    loose = make_problem(layers, num_devices=3, global_batch_size=6, num_pipeline_ranks=3)
    peak = max(formula(loose)(solve(loose, formula(loose)).placement).peak_bytes)
    for share in (0.9, 0.6, 0.4):
        limit = int(share * peak)
        problem = make_problem(
            layers,
            num_devices=3,
            global_batch_size=6,
            num_pipeline_ranks=3,
            memory_limit_bytes=limit,
        )
        solution = solve(problem, formula(problem))
        assert max(formula(problem)(solution.placement).peak_bytes) <= limit
        assert solution.bound_seconds <= solution.step_seconds


def test_some_of_the_first_tries_keep_off_slow_links() -> None:
    """Bounds do not count what pipelines send, so theirs may all be below those without one."""
    problem = make_problem([Layer()] * 12, num_devices=8, global_batch_size=64)
    sizes = Sizes(problem=problem, clock=Clock(limit_seconds=60.0))
    branches = Branches(
        problem=problem,
        num_layers=12,
        sizes=sizes,
        builder=Builder(problem=problem),
        rates=Rates(problem=problem),
    )
    branches.start(batchings(problem, 12))
    leaders = branches.leaders()
    assert any(leader.batching.num_pipeline_ranks == 1 for leader in leaders)
    assert len({leader.batching for leader in leaders}) == len(leaders)
    while (node := branches.next(float("inf"))) is not None:
        assert node not in leaders


def test_what_a_host_lacks_memory_for_is_simulated_once_and_done_without() -> None:
    layers = [Layer(saved_bytes=1 << 20, num_elements=1 << 18)] * 8
    loose = make_problem(layers, num_devices=2, global_batch_size=8)
    peak = max(formula(loose)(solve(loose, formula(loose)).placement).peak_bytes)
    problem = make_problem(
        layers, num_devices=2, global_batch_size=8, memory_limit_bytes=int(0.35 * peak)
    )
    free = solve(problem, formula(problem))
    assert free.placement.offload_state
    tried = Counter[tuple[object, ...]]()

    def simulate(placement: Placement) -> Simulated:
        found = formula(problem)(placement)
        if not placement.offload_state:
            return found
        flags = placement.partition, placement.offload_inputs
        tried[placement.num_replicas, placement.num_pipeline_ranks, *flags] += 1
        return replace(found, host_lack_bytes=1)

    solution = solve(problem, simulate)
    assert not solution.placement.offload_state
    assert solution.step_seconds >= free.step_seconds
    assert tried
    assert max(tried.values()) == 1
