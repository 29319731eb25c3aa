"""What a step is made of adds up to the step, and what bounds it is named."""

import math

import pytest
from explain_problems import chain_problem, planned
from synthetic import chain_cluster, chain_plan

from planner.explain.shares import find_bottleneck, mean_shares, rank_shares
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve import Problem, Simulated, solve


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("stages", "ranks", "micro_batches", "replicas", "partition", "schedule"),
    [
        (1, 1, 1, 1, 0, Schedule.LAYERED),
        (4, 2, 4, 2, 3, Schedule.LAYERED),
        (4, 2, 4, 2, 0, Schedule.INTERLEAVED),
        (3, 3, 5, 1, 0, Schedule.ONE_F_ONE_B),
        (3, 3, 5, 1, 0, Schedule.ZERO_BUBBLE),
    ],
)
def test_parts_add_up_to_the_step(
    stages: int,
    ranks: int,
    micro_batches: int,
    replicas: int,
    partition: int,
    schedule: Schedule,
    recompute: bool,
) -> None:
    plan = chain_plan(
        stages,
        ranks,
        micro_batches,
        num_replicas=replicas,
        partition=partition,
        schedule=schedule,
        recompute=recompute,
        width=1000,
        num_elements=10_000,
        cluster=chain_cluster(ranks * replicas, bandwidth=2e4, latency_seconds=1e-3),
    )
    simulation = simulate(plan)
    found = rank_shares(plan, simulation)
    assert len(found) == ranks
    for shares, busy, exposed in zip(
        found, simulation.busy_seconds, simulation.exposed_seconds, strict=True
    ):
        total = math.fsum(shares.parts().values())
        assert total == pytest.approx(simulation.step_seconds, rel=1e-9)
        assert shares.compute_seconds == pytest.approx(busy)
        assert shares.waiting_seconds == pytest.approx(exposed)
        assert shares.compute.get("recompute", 0.0) == pytest.approx(
            micro_batches * stages / ranks if recompute else 0.0
        )
    mean = mean_shares(found)
    assert math.fsum(mean.parts().values()) == pytest.approx(simulation.step_seconds, rel=1e-9)


def test_what_waits_is_named() -> None:
    """Reductions over a slow link are what the step waits for."""
    plan = chain_plan(
        2, 1, 1, num_replicas=2, num_elements=10**6, cluster=chain_cluster(2, bandwidth=1e5)
    )
    (shares,) = rank_shares(plan, simulate(plan))
    assert max(shares.waiting, key=lambda name: shares.waiting[name]) == "reductions"
    plan = chain_plan(2, 2, 1, width=10**6, cluster=chain_cluster(2, bandwidth=1e5))
    for shares in rank_shares(plan, simulate(plan)):
        assert set(shares.waiting) <= {"transfers"}


def solved(problem: Problem) -> tuple[int, ...]:
    made = planned(problem)

    def simulated_(placement: object) -> Simulated:
        _, simulation = made(placement)  # type: ignore[arg-type]
        return Simulated(step_seconds=simulation.step_seconds, peak_bytes=simulation.peak_bytes)

    placement = solve(problem, simulated_).placement
    plan, simulation = made(placement)
    found = find_bottleneck(plan, simulation, [10**9] * plan.num_pipeline_ranks)
    heavy = [stage.rank for stage in plan.stages if "layer.5" in stage.layers]
    return found.rank, *heavy


def test_the_heavy_layers_rank_is_busiest() -> None:
    rank, heavy = solved(
        chain_problem(8, 4, heavy=5, num_replicas=1, num_pipeline_ranks=4, stages_per_rank=1)
    )
    assert rank == heavy


def test_link_and_memory_are_named() -> None:
    cluster = chain_cluster(4, bandwidth=1e9, devices_per_host=2, network_bandwidth=1e6)
    plan = chain_plan(
        4, 2, 2, num_replicas=2, num_elements=10**5, width=10, saved_bytes=10**7, cluster=cluster
    )
    simulation = simulate(plan)
    found = find_bottleneck(plan, simulation, [10**9, 10**8])
    assert found.link is not None
    assert found.link.busy_seconds <= simulation.step_seconds
    uses = {
        name: num_bytes / simulation.link_rates[name]
        for name, num_bytes in simulation.link_bytes.items()
        if name in simulation.link_rates
    }
    assert uses[found.link.name] == max(uses.values())
    assert (found.memory_rank, found.memory_class) == (1, "activations")
    assert found.memory_limit_bytes == 10**8
    assert found.class_bytes == simulation.memory[1].activations


def test_one_device_sends_nothing() -> None:
    plan = chain_plan(1, 1, 1)
    found = find_bottleneck(plan, simulate(plan), [10**9])
    assert found.link is None
    assert found.rank == found.memory_rank == 0
