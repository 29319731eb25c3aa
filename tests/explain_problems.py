"""Problems on chains of made-up layers, lowered and simulated for real: the explanations' tests."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from synthetic import chain_cluster, chain_graph, chain_profile

from planner.explain.types import PlannerFor
from planner.graph import LayerGraph
from planner.lower import lower
from planner.plan.types import Plan, PlanOptions
from planner.profile import Profile
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve import Constraints, Placement, Problem

QUICK: dict[str, Any] = {
    "stages_per_rank": 1, "offload_state": False, "offload_inputs": False, "num_buffers": 1,
    "schedule": Schedule.LAYERED,
}  # fmt: skip
"""Demands that leave little to search."""


def chain_problem(
    num_layers: int = 8,
    num_devices: int = 4,
    *,
    batch: int = 16,
    memory_bytes: int = 10**9,
    bandwidth: float = 1e10,
    devices_per_host: int | None = None,
    network_bandwidth: float | None = None,
    heavy: int | None = None,
    num_elements: int = 50_000,
    saved_bytes: int = 10**6,
    time_limit_seconds: float = 2.0,
    **wanted: Any,
) -> Problem:
    """Unequal layers of about a millisecond; the layer `heavy` takes five times as long."""
    generator = random.Random(num_layers)
    forward = [1e-3 * generator.uniform(0.8, 1.2) for _ in range(num_layers)]
    if heavy is not None:
        forward[heavy] = 5e-3

    @cache
    def graph_at(size: int) -> LayerGraph:
        return chain_graph(
            num_layers, width=2_000, num_elements=num_elements, micro_batch_size=size
        )

    @cache
    def profile_at(size: int) -> Profile:
        return chain_profile(
            graph_at(size),
            forward_seconds=[seconds * size for seconds in forward],
            backward_seconds=[2 * seconds * size for seconds in forward],
            saved_bytes=saved_bytes * size,
            transient_bytes=saved_bytes * size // 4,
        )

    return Problem(
        graph_at=graph_at,
        profile_at=profile_at,
        cluster=chain_cluster(
            num_devices,
            bandwidth=bandwidth,
            latency_seconds=1e-6,
            devices_per_host=devices_per_host,
            network_bandwidth=network_bandwidth,
            memory_bytes=memory_bytes,
        ),
        num_devices=num_devices,
        global_batch_size=batch,
        constraints=Constraints(**wanted),
        time_limit_seconds=time_limit_seconds,
    )


def planned(problem: Problem) -> Callable[[Placement], tuple[Plan, Simulation]]:
    @cache
    def made(placement: Placement) -> tuple[Plan, Simulation]:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        plan = lower(graph, profile, problem.cluster, placement, PlanOptions())
        return plan, simulate(plan)

    return made


def planner() -> PlannerFor:
    """Each problem's plans are made once."""
    known: list[tuple[Problem, Callable[[Placement], tuple[Plan, Simulation]]]] = []

    def planner_for(problem: Problem) -> Callable[[Placement], tuple[Plan, Simulation]]:
        for other, made in known:
            if other == problem:
                return made
        known.append((problem, planned(problem)))
        return known[-1][1]

    return planner_for
