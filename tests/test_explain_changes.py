"""Changed problems: what is changed, what it buys, frontiers, and two plans side by side."""

import dataclasses

import pytest
from explain_problems import QUICK, chain_problem, planned, planner
from synthetic import chain_plan

from planner.errors import FingerprintError
from planner.explain.changes import WhatIf, changed, grown, offers, resolve
from planner.explain.comparison import compare_plans
from planner.explain.frontier import time_and_devices, time_and_memory
from planner.explain.types import simulator
from planner.simulate import simulate
from planner.solve import Problem, solve

SPREAD = {"devices_per_host": 2, "network_bandwidth": 1e8}


def bandwidths(problem: Problem) -> tuple[float, float]:
    return problem.cluster.hosts[0].link.bandwidth, problem.cluster.network.bandwidth


def test_bandwidth_is_that_of_the_slowest_link_in_use() -> None:
    spread, single = chain_problem(num_devices=4, **SPREAD), chain_problem(num_devices=4)
    assert bandwidths(changed(spread, WhatIf(bandwidth=5e8))) == (1e10, 5e8)
    assert bandwidths(changed(single, WhatIf(bandwidth=5e8))) == (5e8, 1e10)
    both = WhatIf(bandwidth=5e8, host_bandwidth=7e9)
    assert bandwidths(changed(spread, both)) == (7e9, 5e8)
    slow = changed(spread, WhatIf(latency_seconds=1.0))
    assert slow.cluster.network.latency_seconds == 1.0
    assert slow.cluster.hosts == spread.cluster.hosts


def test_shared_adapters_change_in_proportion() -> None:
    problem = chain_problem(num_devices=4, **SPREAD)
    hosts = tuple(
        dataclasses.replace(host, adapter_bandwidth=1.5e8) for host in problem.cluster.hosts
    )
    problem = dataclasses.replace(
        problem, cluster=dataclasses.replace(problem.cluster, hosts=hosts)
    )
    faster = changed(problem, WhatIf(bandwidth=4e8))
    assert [host.adapter_bandwidth for host in faster.cluster.hosts] == [6e8, 6e8]


def test_more_devices_come_from_more_hosts_or_from_the_caller() -> None:
    problem = chain_problem(num_devices=4, **SPREAD)
    more = changed(problem, WhatIf(num_devices=7, global_batch_size=28))
    assert [host.num_devices for host in more.cluster.hosts] == [2, 2, 2, 1]
    assert (more.num_devices, more.global_batch_size) == (7, 28)
    named = changed(problem, WhatIf(num_devices=6), lambda n: grown(problem.cluster, n + 2))
    assert named.cluster.num_devices == 8
    fewer = changed(problem, WhatIf(num_devices=1))
    assert fewer.cluster == problem.cluster


def test_nothing_is_changed_that_was_not_asked_for() -> None:
    problem = chain_problem()
    assert changed(problem, WhatIf()) == problem


@pytest.mark.parametrize(
    ("layers", "devices", "batch"),
    [
        (1, 1, 1),
        pytest.param(8, 4, 16, marks=pytest.mark.slow),
        pytest.param(3, 2, 6, marks=pytest.mark.slow),
    ],
)
def test_more_never_makes_it_slower(layers: int, devices: int, batch: int) -> None:
    problem = chain_problem(layers, devices, batch=batch, time_limit_seconds=2.0)
    made = planner()
    placement = solve(problem, simulator(made(problem))).placement
    _, simulation = made(problem)(placement)
    found = offers(problem, made, placement, time_limit_seconds=2.0)
    assert len(found) == 6 - (devices == 1)
    for offer in found:
        assert offer.step_seconds is not None
        assert offer.step_seconds <= simulation.step_seconds * (1 + 1e-9)
        assert offer.placement is not None
        peaks = simulator(made(offer.problem))(offer.placement).peak_bytes
        assert peaks == offer.peak_bytes


def test_memory_that_binds_is_worth_something() -> None:
    """Without a limit nothing is recomputed, and the step is shorter."""
    problem = chain_problem(6, 2, batch=8, memory_bytes=14 * 10**6, num_elements=10**5)
    made = planner()
    solution = solve(problem, simulator(made(problem)))
    assert any(solution.placement.recompute)
    more = changed(problem, WhatIf(memory_bytes=10**9))
    found = resolve("more memory", more, made, time_limit_seconds=2.0)
    assert found.placement is not None
    assert not any(found.placement.recompute)
    assert found.step_seconds is not None
    assert found.step_seconds < 0.9 * solution.step_seconds


def test_a_change_that_fits_nothing_says_why() -> None:
    problem = chain_problem(**QUICK)
    small = changed(problem, WhatIf(memory_bytes=10**4))
    found = resolve("less memory", small, planner(), time_limit_seconds=2.0)
    assert found.placement is None
    assert "no placement fits in memory" in found.why_none


def test_the_known_plan_is_used_only_where_it_fits() -> None:
    problem = chain_problem(**QUICK)
    made = planner()
    placement = solve(problem, simulator(made(problem))).placement
    peak = max(simulator(made(problem))(placement).peak_bytes)
    less = changed(problem, WhatIf(memory_bytes=peak - 1))
    found = resolve("less", less, made, known=placement, time_limit_seconds=2.0)
    assert found.placement is not None
    assert max(found.peak_bytes) < peak
    bigger = changed(problem, WhatIf(global_batch_size=32))
    found = resolve("more", bigger, made, known=placement, time_limit_seconds=2.0)
    assert found.placement is not None
    assert found.placement.global_batch_size == 32


def test_the_memory_frontier_falls_and_nothing_on_it_is_beaten() -> None:
    problem = chain_problem(8, 2, batch=8, **QUICK)
    points = time_and_memory(problem, planner(), num_points=3, time_limit_seconds=3.0)
    assert len(points) >= 2
    peaks = [point.peak_bytes for point in points]
    seconds = [point.step_seconds for point in points]
    assert (peaks, seconds) == (sorted(peaks), sorted(seconds, reverse=True)) or (
        (peaks, seconds) == (sorted(peaks, reverse=True), sorted(seconds))
    )
    assert peaks[-1] < 0.7 * peaks[0]


def test_the_device_frontier() -> None:
    problem = chain_problem(8, 4, batch=16, **QUICK)
    points = time_and_devices(problem, planner(), time_limit_seconds=2.0)
    assert [point.num_devices for point in points] == [4, 2, 1]
    seconds = [point.step_seconds for point in points]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= 4 * seconds[0] * 1.001


def test_frontiers_of_one_layer_on_one_device() -> None:
    problem = chain_problem(1, 1, batch=1)
    assert len(time_and_devices(problem, planner(), time_limit_seconds=2.0)) == 1
    assert time_and_memory(problem, planner(), num_points=3, time_limit_seconds=2.0)


def test_a_plan_compared_with_itself_and_with_another() -> None:
    plan = chain_plan(4, 2, 2)
    same = compare_plans(plan, simulate(plan), plan)
    assert (same.ratio, same.moved_layers) == (1.0, ())
    other = chain_plan(2, 2, 2, layers_per_stage=2)
    found = compare_plans(plan, simulate(plan), other)
    assert found.ratio == pytest.approx(simulate(plan).step_seconds / simulate(other).step_seconds)
    assert found.moved_layers == ("layer.1", "layer.2", "layer.3")
    with pytest.raises(FingerprintError, match="chain"):
        compare_plans(plan, simulate(plan), chain_plan(5, 2, 2))


def test_planned_is_what_the_solver_is_told() -> None:
    problem = chain_problem()
    made = planned(problem)
    solution = solve(problem, simulator(made))
    assert made(solution.placement)[1].step_seconds == solution.step_seconds
