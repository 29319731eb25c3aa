"""Tables of bubbles, latencies and exposed reductions, for every family of schedules.

The figures follow by arithmetic from the orders' rules on unit costs; they were worked out apart
from this code. Figures for measured times are those published with the zero-bubble schedules.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import chain_cluster, chain_plan

from planner.plan.types import Opcode, Plan
from planner.schedules import Schedule
from planner.simulate import simulate

GPIPE, ONE_F_ONE_B = Schedule.GPIPE, Schedule.ONE_F_ONE_B
DEPTH_FIRST, BREADTH_FIRST = Schedule.INTERLEAVED, Schedule.LAYERED


def layers_16(schedule: Schedule, loops: int, num_micro_batches: int = 8, **more: Any) -> Plan:
    """16 layers on 4 ranks, forward 1 and backward 2 a layer."""
    return chain_plan(
        4 * loops, 4, num_micro_batches, layers_per_stage=4 // loops, schedule=schedule, **more
    )


@pytest.mark.parametrize(
    ("schedule", "loops", "makespan"),
    [
        (GPIPE, 1, 132),
        (ONE_F_ONE_B, 1, 132),
        (DEPTH_FIRST, 2, 114),
        (BREADTH_FIRST, 2, 114),
        (DEPTH_FIRST, 4, 105),
        (BREADTH_FIRST, 4, 105),
    ],
)
def test_makespan_of_16_layers(schedule: Schedule, loops: int, makespan: int) -> None:
    simulation = simulate(layers_16(schedule, loops))
    assert simulation.step_seconds == makespan
    assert simulation.busy_seconds == (96,) * 4
    assert simulation.bubble == pytest.approx(1 - 96 / makespan)
    assert simulation.exposed_seconds == (0,) * 4


@pytest.mark.parametrize("schedule", [GPIPE, ONE_F_ONE_B])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 7, 16])
def test_one_stage_per_rank_has_the_bubble_of_the_ramps(
    schedule: Schedule, num_ranks: int, num_micro_batches: int
) -> None:
    plan = chain_plan(num_ranks, num_ranks, num_micro_batches, schedule=schedule)
    assert simulate(plan).step_seconds == 3 * (num_micro_batches + num_ranks - 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_depth_first_divides_the_bubble_by_the_loops(
    num_ranks: int, loops: int, factor: int
) -> None:
    plan = chain_plan(num_ranks * loops, num_ranks, num_ranks * factor, schedule=DEPTH_FIRST)
    ideal = 3 * loops * num_ranks * factor
    assert simulate(plan).step_seconds == ideal + 3 * (num_ranks - 1)


@pytest.mark.parametrize("num_ranks", range(1, 6))
@pytest.mark.parametrize("loops", range(1, 4))
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 4, 5, 6, 9])
def test_breadth_first_formulas(num_ranks: int, loops: int, num_micro_batches: int) -> None:
    p, v, m = num_ranks, loops, num_micro_batches
    wanted = (p - 1) / (m * v) if m >= p else ((v - 1) * p + m + p - 1) / (v * m) - 1
    makespan = simulate(chain_plan(p * v, p, m)).step_seconds
    assert makespan / (3 * v * m) - 1 == pytest.approx(wanted, abs=1e-9)
    if m >= p:
        idle = simulate(chain_plan(p * v, p, m)).bubble
        assert idle == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_hybrids_between_depth_first_and_breadth_first_have_the_same_bubble(
    group_size: int,
) -> None:
    plan = layers_16(Schedule.HYBRID, 4, 16, group_size=group_size)
    assert simulate(plan).step_seconds == 192 + 9


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_plain_accumulation_on_one_rank_is_never_idle(num_micro_batches: int) -> None:
    simulation = simulate(chain_plan(6, 1, num_micro_batches, schedule=Schedule.PLAIN))
    assert (simulation.step_seconds, simulation.bubble) == (18 * num_micro_batches, 0)


@pytest.mark.parametrize(
    ("schedule", "num_micro_batches", "wanted"),
    [
        (BREADTH_FIRST, 4, 0.3438),
        (BREADTH_FIRST, 5, 0.1750),
        (BREADTH_FIRST, 6, 0.1458),
        (BREADTH_FIRST, 8, 0.1094),
        (DEPTH_FIRST, 4, 0.3438),
        (DEPTH_FIRST, 8, 0.1719),
    ],
)
def test_overhead_where_a_hop_takes_a_quarter_of_a_forward(
    schedule: Schedule, num_micro_batches: int, wanted: float
) -> None:
    cluster = chain_cluster(4, latency_seconds=0.25)
    simulation = simulate(layers_16(schedule, 4, num_micro_batches, cluster=cluster))
    ideal = 12 * num_micro_batches
    assert round(simulation.step_seconds / ideal - 1, 4) == pytest.approx(wanted, abs=1e-4)
    # Every rank waits for some hop, and nobody for more than the overhead.
    assert min(simulation.exposed_seconds) > 0
    assert max(simulation.exposed_seconds) < wanted * ideal


REDUCTIONS = {1: (4, 1, 1), 8: (32, 8, 8), 10: (40, 16, 10), 16: (64, 40, 16), 20: (80, 56, 32)}
"""Seconds of one layer's reduction -> what is exposed with one stage per rank, depth-first and
breadth-first."""


@pytest.mark.parametrize("reduce_seconds", REDUCTIONS)
@pytest.mark.parametrize(
    ("schedule", "loops", "column"),
    [(GPIPE, 1, 0), (ONE_F_ONE_B, 1, 0), (DEPTH_FIRST, 4, 1), (BREADTH_FIRST, 4, 2)],
)
def test_reduction_left_exposed(
    schedule: Schedule, loops: int, column: int, reduce_seconds: int
) -> None:
    num_elements = 1024  # no padding between parameters
    # Two replicas on one host: an all-reduce moves the layer's bytes once out of each.
    cluster = chain_cluster(
        8,
        devices_per_host=2,
        bandwidth=4 * num_elements / reduce_seconds,
        network_bandwidth=1e30,
    )
    plan = layers_16(
        schedule,
        loops,
        cluster=cluster,
        num_elements=num_elements,
        num_replicas=2,
        num_gradient_buffers=4,
    )
    without = simulate(plan, chain_cluster(8)).step_seconds
    exposed = simulate(plan).step_seconds - without
    assert exposed == pytest.approx(REDUCTIONS[reduce_seconds][column])


@pytest.mark.parametrize(("num_ranks", "loops"), [(1, 1), (1, 3), (4, 1), (4, 4), (3, 5)])
def test_hops_of_a_micro_batch(num_ranks: int, loops: int) -> None:
    plan = chain_plan(num_ranks * loops, num_ranks, 2)
    sends = [i for program in plan.programs for i in program if i.opcode is Opcode.SEND]
    forward = [i for i in sends if not i.reads[0].startswith("gradient:")]
    hops = num_ranks * loops - 1 if num_ranks > 1 else 0
    assert (len(forward), len(sends)) == (2 * hops, 4 * hops)
    assert sum(simulate(plan).sent_bytes) == 4 * len(sends)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_zero_bubble_takes_a_third_of_the_ramps(num_ranks: int) -> None:
    """Forward, input half and weight half of one second each: P - 1 seconds of bubble."""
    plan = chain_plan(num_ranks, num_ranks, 2 * num_ranks, schedule=Schedule.ZERO_BUBBLE)
    halves = tuple(replace(stage, backward_weight_seconds=1.0) for stage in plan.stages)
    plan = replace(plan, stages=halves)
    assert simulate(plan).step_seconds == 3 * 2 * num_ranks + num_ranks - 1


def measured_rows() -> list[dict[str, Any]]:
    folder = os.environ.get("LGA_DATA")
    path = Path(folder or "") / "zero-bubble" / "profiles.json"
    if not folder or not path.is_file():
        pytest.skip("LGA_DATA does not name a folder with zero-bubble/profiles.json")
    rows = json.loads(path.read_text())
    assert isinstance(rows, list)
    return rows


def measured_plan(row: dict[str, Any], schedule: Schedule) -> Plan:
    """Times in microseconds; one stage per rank, every hop takes the row's communication time."""
    plan = chain_plan(
        row["p"],
        row["p"],
        row["n"],
        schedule=schedule,
        cluster=chain_cluster(row["p"], latency_seconds=row["c"]),
        forward_seconds=float(row["f"]),
        backward_seconds=float(row["b"] + row["w"]),
    )
    stages = (replace(stage, backward_weight_seconds=float(row["w"])) for stage in plan.stages)
    return replace(plan, stages=tuple(stages))


@pytest.mark.parametrize("index", range(6))
def test_bubble_rates_of_measured_times(index: int) -> None:
    row = measured_rows()[index]
    busy = row["n"] * (row["f"] + row["b"] + row["w"])
    makespan = simulate(measured_plan(row, ONE_F_ONE_B)).step_seconds
    assert makespan == row["f1b1_total_time"]
    assert round((makespan - busy) / makespan, 4) == row["f1b1_bubble_total"]
    split = simulate(measured_plan(row, Schedule.ZERO_BUBBLE)).step_seconds
    assert split == row["zb1p_time"] < makespan
    assert round((split - busy) / split, 4) == row["zb1p_bubble"]
