"""Exact times of the layered order on unit costs: schedule -> lower -> simulate.

The expected figures are derived by arithmetic from the order's rules, independently of this code.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
from small_plans import small_plan
from synthetic import chain_cluster, chain_graph, chain_placement, chain_plan, chain_profile

from planner.errors import CheckError
from planner.lower import lower
from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.simulate import simulate


def starts(plan: Plan, rank: int) -> dict[str, list[float]]:
    """Start times of a rank's compute, by pass and stage: `F0`, `B4`."""
    found: dict[str, list[float]] = {}
    for event in simulate(plan).timeline.events:
        instruction = plan.programs[event.rank][event.index]
        if event.rank == rank and instruction.opcode in (Opcode.FORWARD, Opcode.BACKWARD):
            name = f"{instruction.opcode.value[0]}{instruction.stage}"
            found.setdefault(name, []).append(event.start_seconds)
    return found


def overhead(plan: Plan, num_layers: int, seconds_per_layer: float = 3.0) -> float:
    """Makespan over ideal, minus 1."""
    ideal = num_layers * plan.num_micro_batches * seconds_per_layer / plan.num_pipeline_ranks
    return simulate(plan).step_seconds / ideal - 1


def test_golden_order_has_exact_start_times() -> None:
    plan = chain_plan(8, 4, 4)
    assert simulate(plan).step_seconds == 33
    assert starts(plan, 0) == {
        "F0": [0, 1, 2, 3], "F4": [4, 5, 6, 7], "B4": [17, 19, 21, 23], "B0": [25, 27, 29, 31]
    }  # fmt: skip
    assert starts(plan, 3) == {
        "F3": [3, 4, 5, 6], "F7": [7, 8, 9, 10], "B7": [11, 13, 15, 17], "B3": [19, 21, 23, 25]
    }  # fmt: skip


@pytest.mark.parametrize(("loops", "makespan"), [(1, 132), (2, 114), (4, 105)])
def test_breadth_first_rows(loops: int, makespan: int) -> None:
    plan = chain_plan(4 * loops, 4, 8, layers_per_stage=16 // (4 * loops))
    simulation = simulate(plan)
    assert simulation.step_seconds == makespan
    assert simulation.busy_seconds == (96,) * 4
    assert simulation.bubble == pytest.approx(1 - 96 / makespan)


def test_recompute_as_part_of_backward() -> None:
    assert simulate(chain_plan(16, 4, 8, backward_seconds=3.0)).step_seconds == 140


def test_recompute_runs_while_its_gradient_is_on_the_way() -> None:
    """Three ranks recompute their first micro-batch of the last loop before its gradient comes."""
    assert simulate(chain_plan(16, 4, 8, recompute=True)).step_seconds == 140 - 3


@pytest.mark.parametrize(
    ("num_ranks", "loops", "num_micro_batches"),
    [(8, 1, 8), (8, 1, 9), (8, 1, 16), (8, 8, 8), (8, 8, 9), (8, 8, 16), (4, 4, 5), (1, 3, 2)]
    + [(4, loops, m) for loops in (1, 2, 4, 8) for m in (1, 2, 3)],
)
def test_bubble_formulas(num_ranks: int, loops: int, num_micro_batches: int) -> None:
    p, v, m = num_ranks, loops, num_micro_batches
    wanted = (p - 1) / (m * v) if m >= p else ((v - 1) * p + m + p - 1) / (v * m) - 1
    assert overhead(chain_plan(p * v, p, m), p * v) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("num_micro_batches", "wanted"), [(4, 0.3438), (5, 0.1750), (6, 0.1458), (8, 0.1094)]
)
def test_hop_latency_of_a_quarter_forward(num_micro_batches: int, wanted: float) -> None:
    cluster = chain_cluster(4, latency_seconds=0.25)
    plan = chain_plan(16, 4, num_micro_batches, cluster=cluster)
    assert overhead(plan, 16) == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize(
    ("reduce_seconds", "exposed"), [(1, 1), (8, 8), (10, 10), (16, 16), (20, 32)]
)
def test_reduction_left_exposed(partition: int, reduce_seconds: int, exposed: int) -> None:
    num_elements = 1000
    # A ring over two replicas moves half the bytes once (scatter) or twice (all-reduce); where
    # weights are partitioned, gathers take as long, so only the scatter's own tail is compared.
    moved_bytes = 4 * num_elements / 2 * (2 if partition == 0 else 1)
    cluster = chain_cluster(
        8, devices_per_host=2, bandwidth=moved_bytes / reduce_seconds, network_bandwidth=1e30
    )
    plan = chain_plan(
        16,
        4,
        8,
        cluster=cluster,
        num_elements=num_elements,
        num_replicas=2,
        partition=partition,
        num_weight_buffers=4,
    )
    simulation = simulate(plan)
    if partition == 0:
        assert simulation.step_seconds - 105 == pytest.approx(exposed)
    elif reduce_seconds <= 16:
        assert simulation.tail_seconds == pytest.approx(exposed)


def traffic(plan: Plan) -> list[tuple[int, int]]:
    counts = [Counter(i.opcode for i in program) for program in plan.programs]
    return [(count[Opcode.GATHER], count[Opcode.REDUCE]) for count in counts]


@pytest.mark.parametrize(("num_buffers", "gathers"), [(1, 7), (2, 6), (3, 5), (4, 4)])
def test_gathers_per_rank_fall_with_buffers(num_buffers: int, gathers: int) -> None:
    plan = chain_plan(16, 4, 8, num_replicas=2, partition=3, num_weight_buffers=num_buffers)
    assert traffic(plan) == [(gathers, 4)] * 4


@pytest.mark.parametrize(
    ("num_layers", "num_micro_batches", "wanted"),
    [(4, 4, (6, 4)), (8, 4, (14, 8)), (16, 8, (30, 16)), (160, 5, (318, 160))],
)
def test_gathers_of_one_rank_do_not_grow_with_micro_batches(
    num_layers: int, num_micro_batches: int, wanted: tuple[int, int]
) -> None:
    plan = chain_plan(num_layers, 1, num_micro_batches, num_replicas=2, partition=3)
    assert traffic(plan) == [wanted]


def test_one_of_everything() -> None:
    simulation = simulate(chain_plan(1, 1, 1))
    assert (simulation.step_seconds, simulation.bubble) == (3, 0)


def test_transfers_take_latency_and_bytes_and_hops_are_counted() -> None:
    # 4 bytes at 8 bytes/s and 0.25 s latency: 0.75 s a hop, one forward and one backward.
    cluster = chain_cluster(2, bandwidth=8.0, latency_seconds=0.25)
    simulation = simulate(chain_plan(2, 2, 1, cluster=cluster))
    assert simulation.step_seconds == pytest.approx(6 + 2 * 0.75)
    assert simulation.sent_bytes == (4, 4)


def test_transfers_of_one_rank_share_its_link() -> None:
    # Rank 0 sends h_0 and a skip to rank 1 and rank 2 at once, each 1 s long alone.
    graph = chain_graph(3, skips=[(0, 2)])
    placement = chain_placement(3, 3, 1)
    cluster = chain_cluster(3, bandwidth=4.0)
    plan = lower(graph, chain_profile(graph), cluster, placement, PlanOptions())
    arrivals = sorted(
        event.end_seconds
        for event in simulate(plan).timeline.events
        if event.rank == 0 and plan.programs[0][event.index].opcode is Opcode.SEND
    )
    assert arrivals == [3, 3]


def test_links_between_hosts_are_the_network() -> None:
    cluster = chain_cluster(2, devices_per_host=1, network_latency_seconds=1.0)
    assert simulate(chain_plan(2, 2, 1, cluster=cluster)).step_seconds == pytest.approx(8)


def test_events_follow_programs_and_streams() -> None:
    plan = chain_plan(4, 2, 3, num_replicas=2, partition=3)
    events = simulate(plan).timeline.events
    assert [(e.rank, e.index) for e in events] == [
        (rank, index) for rank, program in enumerate(plan.programs) for index in range(len(program))
    ]
    last_end: dict[tuple[int, str], float] = {}
    for event in events:
        stream = (event.rank, plan.programs[event.rank][event.index].stream)
        assert event.start_seconds >= last_end.get(stream, 0.0)
        last_end[stream] = event.end_seconds


@pytest.mark.parametrize("seed", range(20))
def test_without_bandwidth_limits_a_step_is_the_longest_path(seed: int) -> None:
    plan = small_plan(random.Random(seed), max_instructions=200)
    cluster = chain_cluster(plan.world_size, latency_seconds=0.25)
    order = partial_order(plan)
    simulation = simulate(plan, cluster, order=order)
    took = {(e.rank, e.index): e.end_seconds - e.start_seconds for e in simulation.timeline.events}
    ends = [0.0] * len(order.members)
    for task in order.sorted_tasks():
        start = max((ends[earlier] for earlier in order.predecessors[task]), default=0.0)
        ends[task] = start + took[order.members[task][0]]
    assert simulation.step_seconds == pytest.approx(max(ends))
    for event in simulation.timeline.events:
        task = order.task_of[event.rank][event.index]
        assert event.end_seconds == pytest.approx(ends[task])
    assert simulation == simulate(plan, cluster)


def test_a_plan_that_cannot_end_is_refused() -> None:
    plan = chain_plan(2, 2, 1)
    receives = [i for i, x in enumerate(plan.programs[1]) if x.opcode is Opcode.RECEIVE]
    program = plan.programs[1][: receives[0]] + plan.programs[1][receives[0] + 1 :]
    with pytest.raises(CheckError, match="no RECEIVE"):
        simulate(replace(plan, programs=(plan.programs[0], program)))
