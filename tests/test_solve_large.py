"""Large models: nearly nothing fits, profiling is slow, and some micro-batch sizes fail."""

import dataclasses
import math
import time
from functools import cache

import pytest
from solve_chain import Layer, formula, make_cluster, make_problem

from planner.errors import TraceError
from planner.graph import LayerGraph
from planner.profile import Profile
from planner.solve import Problem, solve

GIB = 2**30


def large_problem(time_limit_seconds: float) -> Problem:
    """83 layers of 0.4 GB on 64 devices of 20 GiB: 100 GB of state, 2 GB saved per layer."""
    layers = [
        Layer(
            forward_seconds=0.05,
            backward_seconds=0.1,
            num_elements=10**8,
            saved_bytes=2 * 10**9,
            output_elements=4 * 10**6,
            transient_bytes=10**8,
        )
    ] * 83
    return make_problem(
        layers,
        num_devices=64,
        global_batch_size=512,
        cluster=make_cluster(64, num_hosts=8, bandwidth=1e11),
        memory_limit_bytes=20 * GIB,
        time_limit_seconds=time_limit_seconds,
    )


def test_large_models_get_layered_accumulation_on_all_devices() -> None:
    problem = large_problem(time_limit_seconds=8.0)
    solution = solve(problem, formula(problem))
    placement = solution.placement
    assert placement.world_size == 64
    assert placement.partition == 3
    assert sum(placement.recompute) > placement.num_stages / 2
    assert placement.num_stages >= 8 * placement.num_pipeline_ranks
    assert placement.num_micro_batches >= 2
    assert solution.gap < 0.1
    ideal_seconds = 512 / 64 * 83 * 0.2
    assert solution.step_seconds < 1.05 * ideal_seconds


def test_profiling_takes_no_search_time() -> None:
    """Sizes that take longer to profile than the whole search may take."""
    problem = large_problem(time_limit_seconds=1.0)
    graph_at = problem.graph_at

    sizes = set[int]()

    @cache
    def slow_graph_at(size: int) -> LayerGraph:
        sizes.add(size)
        time.sleep(0.5)
        return graph_at(size)

    slow = dataclasses.replace(problem, graph_at=slow_graph_at)
    started = time.monotonic()
    solution = solve(slow, formula(problem))
    assert solution.placement.world_size == 64
    assert solution.placement.partition == 3
    assert len(sizes) >= 2
    assert solution.solve_seconds < time.monotonic() - started - 0.5 * len(sizes)


def refusing(problem: Problem, *sizes: int, by_profile: bool = False) -> Problem:
    """The problem, where the model cannot be traced (or profiled) with these sizes."""

    def graph_at(size: int) -> LayerGraph:
        if size in sizes and not by_profile:
            raise TraceError(f"batch norm needs more than {size}", hint="more")
        return problem.graph_at(size)

    def profile_at(size: int) -> Profile:
        if size in sizes:
            raise TraceError(f"batch norm needs more than {size}", hint="more")
        return problem.profile_at(size)

    return dataclasses.replace(problem, graph_at=graph_at, profile_at=profile_at)


@pytest.mark.parametrize("by_profile", [False, True])
def test_sizes_that_cannot_be_traced_are_left_out(by_profile: bool) -> None:
    free = make_problem([Layer()] * 8, num_devices=4, num_pipeline_ranks=4, global_batch_size=8)
    assert solve(free, formula(free)).placement.micro_batch_size == 1
    problem = refusing(free, 1, by_profile=by_profile)
    solution = solve(problem, formula(free))
    assert solution.placement.micro_batch_size == 2
    refused = [c for c in solution.candidates if c.micro_batch_size == 1]
    assert refused
    for candidate in refused:
        assert candidate.verdict.startswith("infeasible: the model cannot be traced")
        assert "batch norm needs more than 1" in candidate.verdict
        assert candidate.bound_seconds == math.inf


def test_demanded_size_that_cannot_be_traced_is_an_error() -> None:
    problem = make_problem([Layer()] * 4, global_batch_size=8, micro_batch_size=1)
    with pytest.raises(TraceError, match="more than 1"):
        solve(refusing(problem, 1), formula(problem))


def test_no_size_can_be_traced() -> None:
    problem = make_problem([Layer()] * 4, global_batch_size=4)
    with pytest.raises(TraceError, match="more than 1"):
        solve(refusing(problem, 1, 2, 4), formula(problem))


def test_dear_messages_make_fewer_and_larger_micro_batches() -> None:
    def count(message_seconds: float) -> int:
        problem = make_problem(
            [Layer()] * 16,
            num_devices=4,
            num_pipeline_ranks=4,
            global_batch_size=64,
            cluster=make_cluster(4, message_seconds=message_seconds),
        )
        return solve(problem, formula(problem)).placement.num_micro_batches

    assert count(5e-3) < count(0.0)


def test_messages_on_one_rank_cost_nothing() -> None:
    def seconds(message_seconds: float) -> float:
        cluster = make_cluster(1, message_seconds=message_seconds)
        problem = make_problem([Layer()] * 4, cluster=cluster, stages_per_rank=4)
        return solve(problem, formula(problem)).step_seconds

    assert seconds(1.0) == seconds(0.0)
