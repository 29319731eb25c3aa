"""Which world ranks lie where: as a numbering, in the simulator, in a file, and in a real run."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from synthetic import chain_cluster, chain_graph, chain_plan, chain_profile
from training import even_plan, example, train_by_plan

from planner.check import check
from planner.layouts import Grid, Layout
from planner.lower import lower
from planner.plan.file import parse_plan, print_plan
from planner.plan.types import PlanOptions
from planner.simulate import simulate
from planner.solve import Constraints, Placement, Problem, Simulated, solve

REPLICAS, PIPELINE = Layout.REPLICAS_INSIDE, Layout.PIPELINE_INSIDE


@pytest.mark.parametrize("layout", Layout)
def test_every_device_has_one_place(layout: Layout) -> None:
    for replicas, ranks in itertools.product((1, 2, 3, 5), repeat=2):
        grid = Grid(num_replicas=replicas, num_pipeline_ranks=ranks, layout=layout)
        places = [grid.coordinates(world_rank) for world_rank in range(grid.world_size)]
        assert sorted(places) == list(itertools.product(range(ranks), range(replicas)))
        assert [grid.world_rank(*place) for place in places] == list(range(grid.world_size))
        for rank in range(ranks):
            group = [grid.world_rank(rank, replica) for replica in range(replicas)]
            assert list(grid.replicas_of(rank)) == group == sorted(group)


def test_neighbours_are_replicas_or_pipeline_ranks() -> None:
    grid = Grid(num_replicas=2, num_pipeline_ranks=3)
    assert [grid.coordinates(r) for r in range(3)] == [(0, 0), (0, 1), (1, 0)]
    grid = replace(grid, layout=PIPELINE)
    assert [grid.coordinates(r) for r in range(4)] == [(0, 0), (1, 0), (2, 0), (0, 1)]


@pytest.mark.parametrize(
    ("width", "num_elements", "faster"), [(100, 1, PIPELINE), (1, 400, REPLICAS)]
)
def test_the_heavier_traffic_is_faster_inside_hosts(
    width: int, num_elements: int, faster: Layout
) -> None:
    """Two hosts of two devices: boundary tensors or gradients leave the host, not both."""
    cluster = chain_cluster(4, bandwidth=1e6, devices_per_host=2, network_bandwidth=100.0)
    found = {
        layout: simulate(
            chain_plan(
                4,
                2,
                2,
                width=width,
                num_elements=num_elements,
                num_replicas=2,
                cluster=cluster,
                layout=layout,
            )
        )
        for layout in Layout
    }
    assert min(found, key=lambda layout: found[layout].step_seconds) is faster
    hops, reductions = (
        found[layout].link_bytes["network port of rank 0, out"] for layout in Layout
    )
    assert hops == 4 * width * 2 * (2 + 1)  # two stages forward and one backward, two micro-batches
    assert reductions == 4 * num_elements * 2  # two stages of an all-reduce over two


def test_a_stage_goes_at_the_pace_of_its_slowest_replica() -> None:
    cluster = chain_cluster(4, devices_per_host=2)
    first, second = cluster.hosts
    slow = replace(second, device=replace(second.device, message_seconds=1.0))
    cluster = replace(cluster, hosts=(first, slow))
    shape: dict[str, Any] = {"num_replicas": 2, "cluster": cluster}
    inside = chain_plan(2, 2, 1, **shape)
    across = chain_plan(2, 2, 1, layout=PIPELINE, **shape)
    assert [stage.forward_seconds for stage in inside.stages] == [1.0, 2.0]
    assert [stage.forward_seconds for stage in across.stages] == [2.0, 2.0]


def test_a_plan_keeps_its_layout() -> None:
    plan = chain_plan(4, 2, 2, num_replicas=3, partition=3, layout=PIPELINE)
    assert plan.world_rank(1, 2) == 5
    assert plan.coordinates(2) == (0, 1)
    assert parse_plan(print_plan(plan)) == plan
    assert check(plan).passed


@pytest.mark.parametrize("partition", [0, 3])
def test_training_is_bitwise_the_same_in_both_layouts(partition: int) -> None:
    """Replicas are added in the same order wherever they are."""
    torch.set_num_threads(1)
    runs = []
    for layout in Layout:
        plan = even_plan(
            "mlp",
            num_replicas=2,
            num_pipeline_ranks=3,
            num_micro_batches=2,
            partition=partition,
            layout=layout,
        )
        runs.append(train_by_plan(example("mlp")[0], plan, num_steps=2))
    one, other = runs
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        assert torch.equal(value, other.state[name]), name
    assert one.steps[0].losses.keys() == other.steps[0].losses.keys()


@pytest.mark.parametrize(
    ("width", "num_elements", "layout"), [(1000, 1, PIPELINE), (1, 4000, REPLICAS)]
)
def test_the_solver_lays_the_mesh_on_the_hosts(
    width: int, num_elements: int, layout: Layout
) -> None:
    """What is heavy stays inside hosts: boundary tensors, or gradients."""
    cluster = chain_cluster(4, bandwidth=1e6, devices_per_host=2, network_bandwidth=1000.0)
    made = partial(chain_graph, 4, width=width, num_elements=num_elements)
    problem = Problem(
        graph_at=lambda size: made(micro_batch_size=size),
        profile_at=lambda size: chain_profile(made(micro_batch_size=size)),
        cluster=cluster,
        num_devices=4,
        global_batch_size=4,
        constraints=Constraints(
            num_replicas=2, num_pipeline_ranks=2, stages_per_rank=2, micro_batch_size=1
        ),
    )

    def simulated(placement: Placement) -> Simulated:
        graph = problem.graph_at(1)
        plan = lower(graph, problem.profile_at(1), cluster, placement, PlanOptions())
        found = simulate(plan)
        return Simulated(step_seconds=found.step_seconds, peak_bytes=found.peak_bytes)

    solution = solve(problem, simulated)
    assert solution.placement.layout is layout
    other = REPLICAS if layout is PIPELINE else PIPELINE
    worse = simulated(replace(solution.placement, layout=other))
    assert worse.step_seconds > solution.step_seconds
    assert solution.bound_seconds <= solution.step_seconds
