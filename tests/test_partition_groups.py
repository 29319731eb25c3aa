"""State partitioned inside groups of replicas, and whole in every group."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import judge
from plan_changes import broken_rules
from planned import Chain, assert_same, model_of, plan_of, square, traced, vectors
from stepping import batches, on_every_rank
from synthetic import chain_cluster, chain_graph, chain_plan, chain_profile
from test_memory_run import assert_bounded
from test_memory_run import plan as plan_with_updates
from test_partitions import CHAIN, TiedEnds
from torch import Tensor, nn
from training import train_by_plan

from planner.check import check
from planner.errors import PlanFileError, UsageError
from planner.layouts import Grid, Layout
from planner.lower import lower
from planner.plan.file import parse_plan, print_plan
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.precision import Precision
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.simulate.memory import resident_memory
from planner.solve import Constraints, Placement, Problem, Simulated, solve
from runtime.checkpoint.rank import parts_of
from runtime.executor import Executor

FLOAT = 4
ENDS = PlanOptions(deadline_seconds=20, check_finite=True, clip_norm=0.05, save=True)
DELAYED = PlanOptions(deadline_seconds=20, clip_norm=0.05, clip_delayed=True)
MIXED = PlanOptions(deadline_seconds=20, precision=Precision.BFLOAT16)


class UnevenTiedEnds(TiedEnds):
    """Nine elements make no two equal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(nn.Linear(8, 9), nn.Dropout(0.1), nn.Linear(9, 8))


TIED = model_of(UnevenTiedEnds)


@pytest.mark.parametrize("layout", Layout)
def test_groups_and_holders_of_a_part_cover_the_replicas(layout: Layout) -> None:
    for ranks, replicas, size in ((1, 1, 0), (1, 1, 1), (2, 6, 2), (3, 4, 4), (2, 6, 0), (1, 3, 1)):
        grid = Grid(
            num_replicas=replicas,
            num_pipeline_ranks=ranks,
            layout=layout,
            partition_group_size=size,
        )
        for rank in range(ranks):
            everyone = list(grid.replicas_of(rank))
            groups, holders = grid.partition_groups(rank), grid.part_holders(rank)
            assert [member for group in groups for member in group] == everyone
            assert {len(group) for group in groups} == {grid.num_parts}
            assert [list(row) for row in zip(*groups, strict=True)] == list(map(list, holders))


def grouped(partition: int = 3, **choices: Any) -> Plan:
    return chain_plan(num_replicas=4, partition=partition, partition_group_size=2, **choices)


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_a_group_of_all_is_no_group_and_a_group_of_one_is_no_partition(partition: int) -> None:
    every = chain_plan(num_replicas=4, partition=partition)
    assert chain_plan(num_replicas=4, partition=partition, partition_group_size=4) == every
    alone = chain_plan(num_replicas=4, partition=partition, partition_group_size=1)
    assert alone == chain_plan(num_replicas=4, partition=0)
    assert alone == chain_plan(num_replicas=4, partition=0, partition_group_size=2)
    one = chain_plan(num_replicas=1, partition=partition, partition_group_size=1)
    assert one == chain_plan(num_replicas=1)


@pytest.mark.parametrize("size", [-1, 3, 8])
def test_replicas_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(
        UsageError, match=f"4 replicas do not divide into partition groups of {size}"
    ):
        chain_plan(num_replicas=4, partition=3, partition_group_size=size)


def test_a_plan_keeps_its_groups() -> None:
    plan = grouped()
    assert parse_plan(print_plan(plan)) == plan
    assert (plan.num_parts, plan.grid.partition_group_size) == (2, 2)
    # Without groups a file is what it was before there were any.
    assert "partition_group_size" not in print_plan(chain_plan(num_replicas=4, partition=3))


@pytest.mark.parametrize(("size", "partition"), [(3, 3), (4, 3), (1, 3), (-2, 3), (2, 0)])
def test_a_file_of_other_groups_is_refused(size: int, partition: int) -> None:
    with pytest.raises(PlanFileError, match=f"partition {partition} in groups of {size} of 4"):
        check(replace(grouped(partition), partition_group_size=size))


def test_memory_by_level() -> None:
    """10 elements in each of four stages, in halves; buffers of two stages."""
    resident = [
        resident_memory(grouped(level, num_stages=4, num_pipeline_ranks=1, num_elements=10), 0)
        for level in (1, 2, 3)
    ]
    assert [moment.weights for moment in resident] == [4 * 10 * FLOAT] * 2 + [4 * 5 * FLOAT]
    assert [moment.optimizer for moment in resident] == [2 * 4 * 5 * FLOAT] * 3
    assert [moment.buffers for moment in resident] == [0, 0, 2 * 10 * FLOAT]


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_the_rules_hold_and_the_oracle_agrees(partition: int) -> None:
    plan = grouped(partition, num_elements=6, tied=[(0, 3)])
    assert check(plan).passed
    assert not judge(plan).faults
    # Programs of parts of two, in tables of parts of four.
    wrong = replace(plan, partition_group_size=0)
    assert 5 in broken_rules(wrong)
    assert "shape" in judge(wrong).kinds


@pytest.mark.parametrize(
    ("partition", "tail"), [(1, 2 * 3 / 4 * 8 + 0.5), (2, 0.5 + 4 + 0.5), (3, 0.5 + 4)]
)
def test_only_sums_over_groups_leave_the_host(partition: int, tail: float) -> None:
    """Two hosts of two devices; a unit takes a second inside a host, and eight over the network.

    Behind the last backward: at level 1 an all-reduce over four (the network carries it twice) and
    a gather inside hosts; at level 2 half a unit inside, an all-reduce of half a unit between two
    (each sends a half of it twice, and both devices share no adapter), and a gather inside.
    """
    num_bytes = FLOAT * 1000
    cluster = chain_cluster(
        4, bandwidth=num_bytes, devices_per_host=2, network_bandwidth=num_bytes / 8
    )
    plan = grouped(
        partition, num_stages=4, num_pipeline_ranks=1, cluster=cluster, num_elements=1000,
        num_micro_batches=8,
    )  # fmt: skip
    found = simulate(plan)
    assert found.tail_seconds == pytest.approx(tail)
    units = 4 * num_bytes
    gathers = sum(i.opcode is Opcode.GATHER for i in plan.programs[0]) / 4
    inside, outside = (
        found.link_bytes[f"{name} port of rank 0, out"] for name in ("link", "network")
    )
    if partition == 1:
        assert outside == pytest.approx(2 * 3 / 4 * units)
    else:
        assert outside == pytest.approx(2 * 1 / 2 * units / 2)
        assert inside == pytest.approx((1 + gathers) * units / 2)


def test_groups_share_what_leaves_their_hosts() -> None:
    """Parts are summed over groups at once, so both devices of a host share its adapters."""
    cluster = chain_cluster(4, bandwidth=1e9, devices_per_host=2, network_bandwidth=1e3)
    hosts = tuple(replace(host, adapter_bandwidth=1e3) for host in cluster.hosts)
    shape: dict[str, Any] = {"num_stages": 1, "num_pipeline_ranks": 1, "num_elements": 1000}
    free, shared = (
        simulate(grouped(3, cluster=one, **shape)).tail_seconds
        for one in (cluster, replace(cluster, hosts=hosts))
    )
    assert shared == pytest.approx(2 * free, rel=1e-3)


def test_the_solver_gathers_inside_hosts_where_memory_allows() -> None:
    """Nothing is demanded of groups. Halves of the state take more memory than quarters."""
    cluster = chain_cluster(4, bandwidth=1e3, devices_per_host=2, network_bandwidth=100.0)
    made = partial(chain_graph, 4, num_elements=100)
    problem = Problem(
        graph_at=lambda count: made(micro_batch_size=count),
        profile_at=lambda count: chain_profile(made(micro_batch_size=count)),
        cluster=cluster,
        num_devices=4,
        global_batch_size=8,
        constraints=Constraints(
            num_replicas=4, stages_per_rank=4, num_buffers=1, partition=3, recompute=False
        ),
    )

    def simulated(placement: Placement) -> Simulated:
        size = placement.micro_batch_size
        graph, profile = problem.graph_at(size), problem.profile_at(size)
        found = simulate(lower(graph, profile, cluster, placement, PlanOptions()))
        return Simulated(step_seconds=found.step_seconds, peak_bytes=found.peak_bytes)

    free = solve(problem, simulated)
    assert free.placement.partition_group_size == 2
    assert free.bound_seconds <= free.step_seconds
    every = replace(problem.constraints, partition_within=4)
    whole = solve(replace(problem, constraints=every), simulated)
    assert whole.placement.partition_group_size == 0
    assert whole.step_seconds > free.step_seconds
    limit = max(simulated(whole.placement).peak_bytes)
    assert max(simulated(free.placement).peak_bytes) > limit
    tight = solve(replace(problem, memory_limit_bytes=limit), simulated)
    assert tight.placement.partition_group_size == 0


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one rank": (CHAIN, {"recompute": True}),
    "pipeline inside": (CHAIN, {"num_pipeline_ranks": 2, "layout": Layout.PIPELINE_INSIDE}),
    "tied on two ranks": (TIED, {"num_pipeline_ranks": 2}),
    "ends": (TIED, {"num_pipeline_ranks": 2, "options": ENDS}),
    "delayed clip": (TIED, {"options": DELAYED}),
    "offloaded": (CHAIN, {"num_pipeline_ranks": 2, "offload_state": True}),
    "plain order, one buffer": (CHAIN, {"schedule": Schedule.PLAIN, "num_gradient_buffers": 1}),
}


def grouped_plan(model_file: Any, partition: int, **choices: Any) -> Plan:
    num_layers = len(traced(model_file).layer_graph(2).layers)
    return plan_of(
        model_file,
        (0, 1, 2, num_layers),
        num_replicas=choices.pop("num_replicas", 4),
        partition=partition,
        partition_group_size=choices.pop("partition_group_size", 2),
        num_micro_batches=2,
        **choices,
    )


def every_state(plan: Plan, model_file: Any) -> list[tuple[dict[str, Tensor], Any]]:
    """Of every world rank, after two steps; and the norm of the gradient of the last one."""
    given = [batches(plan, model_file, step) for step in range(2)]

    def run(executor: Executor) -> tuple[dict[str, Tensor], Any]:
        for step in range(2):
            result = executor.step(given[step][executor.replica])
        return executor.state_dict(), result.gradient_norm

    return on_every_rank(plan, model_file, run)


@pytest.mark.parametrize("partition", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_groups_train_as_plain_accumulation_does(name: str, partition: int) -> None:
    """Gradients as those of plain accumulation, parameters equal on all replicas, bit by bit."""
    model_file, choices = CASES[name]
    plan = grouped_plan(model_file, partition, **choices)
    assert (plan.num_replicas, plan.num_parts) == (4, 2)
    assert_same(model_file, plan, 1e-6)
    found = every_state(plan, model_file)
    whole = grouped_plan(model_file, partition, **choices, partition_group_size=0)
    for world_rank, (state, norm) in enumerate(found):
        rank = plan.coordinates(world_rank)[0]
        first, _ = found[plan.world_rank(rank, 0)]
        assert state.keys() == first.keys()
        assert all(torch.equal(value, first[key]) for key, value in state.items())
        if norm is not None:
            wanted = every_state(whole, model_file)[0][1] if world_rank == 0 else found[0][1]
            assert norm == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_six_replicas_in_groups_of_three(partition: int) -> None:
    """Sums over two groups; and over three groups of two."""
    for size in (3, 2):
        plan = grouped_plan(TIED, partition, num_replicas=6, partition_group_size=size)
        assert_same(TIED, plan, 1e-6)


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_masters_of_mixed_precision_are_in_groups(partition: int) -> None:
    plan = grouped_plan(CHAIN, partition, options=MIXED)
    whole = grouped_plan(CHAIN, 0, options=MIXED, partition_group_size=0)
    found, plain = every_state(plan, CHAIN), every_state(whole, CHAIN)
    for (state, _), (wanted, _) in zip(found, plain, strict=True):
        for key, value in state.items():
            assert torch.equal(value, found[0][0][key])
            assert torch.allclose(value, wanted[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_traffic_is_what_the_simulator_counts(partition: int) -> None:
    plan = plan_of(CHAIN, (0, 2, 5), num_replicas=4, partition=partition, partition_group_size=2)
    sizes = [unit.num_elements * FLOAT for unit in plan.units]
    gathers = sum(i.opcode is Opcode.GATHER for i in plan.programs[0])
    inside = sum(sizes) / 2 * (gathers / len(sizes))
    reduced = sum(sizes) * 2 * 3 / 4 if partition == 1 else sum(sizes) * (1 / 2 + 1 / 2)
    for traffic in train_by_plan(CHAIN, plan, num_steps=1).traffic:
        assert traffic.num_calls["reduce"] == len(sizes)
        # What makes parts equal travels too.
        slack = 64 * len(sizes)
        assert 0 <= traffic.num_bytes["reduce"] - reduced <= slack
        assert 0 <= traffic.num_bytes["gather"] - inside <= slack


def plan_at(level: int | str) -> Plan:
    """Of the same work: partitioned at a level over all, or as `3 of 2`, at level 3 by twos."""
    partition, _, size = str(level).partition(" of ")
    return grouped_plan(
        TIED, int(partition), partition_group_size=int(size or 0), num_pipeline_ranks=2
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [("3 of 2", "0"), ("3 of 2", "3"), ("0", "3 of 2"), ("3", "2 of 2"), ("1 of 2", "3 of 2")],
)
def test_any_plan_goes_on_from_a_checkpoint_of_groups_and_back(
    tmp_path: Path, first: str, second: str
) -> None:
    made, other = plan_at(first), plan_at(second)
    given = [batches(made, TIED, step) for step in range(3)]

    def save(executor: Executor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for step in range(2):
            executor.step(given[step][executor.replica])
        executor.save(tmp_path / "half")
        half = executor.state_dict()
        executor.step(given[2][executor.replica])
        return half, executor.state_dict()

    def resume(executor: Executor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert executor.load(tmp_path / "half").num_steps == 2
        half = executor.state_dict()
        executor.step(given[2][executor.replica])
        return half, executor.state_dict()

    before, after = on_every_rank(made, TIED, save), on_every_rank(other, TIED, resume)
    for (half, whole), (loaded, resumed) in zip(before, after, strict=True):
        assert half.keys() == loaded.keys()
        assert all(torch.equal(value, half[key]) for key, value in loaded.items())
        # The optimizer went on from its moments: else its step is ten times as large.
        for key, value in resumed.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)


def test_the_first_group_writes_a_checkpoint() -> None:
    made, plain = plan_at("3 of 2"), plan_at("0")

    def written(executor: Executor) -> int:
        executor.step(given[executor.replica])
        return sum(part.values.nbytes for part in parts_of(executor._rank, {}))

    given = batches(made, TIED, 0)
    mine, whole = on_every_rank(made, TIED, written), on_every_rank(plain, TIED, written)
    wrote = {made.coordinates(rank)[1] for rank, num_bytes in enumerate(mine) if num_bytes}
    assert wrote == {0, 1}
    assert FLOAT * len(made.parameters) * 2 >= sum(mine) - sum(whole) >= 0  # counters of steps


@pytest.mark.parametrize("partition", [1, 2, 3])
def test_measured_peaks_keep_the_bound(partition: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = model_of(
        lambda: Chain(lambda: nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))), square, vectors
    )
    made = plan_with_updates(
        model_file, 1, recompute=False, num_replicas=4, partition=partition,
        partition_group_size=2,
    )  # fmt: skip
    assert_bounded(made, model_file, monkeypatch)
