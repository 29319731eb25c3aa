"""Schedules read from torch's CSV: what is refused, and what the others cost."""

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_torch_pipelining import FAMILIES, plan_of
from torch.distributed.pipelining.schedules import FORWARD, _validate_schedule
from torch_schedules import Rows, csv_of, torch_order

from planner.check import check
from planner.errors import UsageError
from planner.export.skeleton import StageCosts, ideal_cluster, skeleton_plan
from planner.export.torch_csv import CsvFormat, print_csv
from planner.export.torch_import import ImportedSchedule, parse_csv
from planner.plan.file import parse_plan, print_plan
from planner.plan.types import Opcode, Plan
from planner.schedule import ComputeStep
from planner.schedules import Schedule
from planner.simulate import simulate

NUM_RANKS = 4
NUM_LAYERS = 16
NUM_MICRO_BATCHES = 8


def plan_from(schedule: ImportedSchedule, costs: StageCosts | None = None) -> Plan:
    cluster = ideal_cluster(len(schedule.order.ranks))
    return skeleton_plan(schedule, costs or StageCosts(), cluster)


def layer_costs(stages_per_rank: int) -> StageCosts:
    """One second forward and two backward, half of them for weights, for each of 16 layers."""
    layers = NUM_LAYERS / (NUM_RANKS * stages_per_rank)
    return StageCosts(
        forward_seconds=(layers,), backward_seconds=(2 * layers,), backward_weight_seconds=(layers,)
    )


def torch_rows(name: str, stages_per_rank: int) -> Rows:
    return torch_order(name, NUM_RANKS, stages_per_rank, NUM_MICRO_BATCHES)


def repaired_1f1b() -> Rows:
    """torch 2.13 numbers the forwards of the last rank from 1; its step runs them from 0."""
    rows = torch_rows("Schedule1F1B", 1)
    rows[NUM_RANKS - 1] = [
        action._replace(microbatch_index=(action.microbatch_index or 0) - 1)
        if action is not None and action.computation_type is FORWARD
        else action
        for action in rows[NUM_RANKS - 1]
    ]
    return rows


@pytest.mark.parametrize(
    ("name", "stages_per_rank", "makespan"),
    [
        ("ScheduleGPipe", 1, 132),
        ("Schedule1F1B", 1, 132),
        ("ScheduleInterleaved1F1B", 1, 132),
        ("ScheduleInterleaved1F1B", 2, 114),
        ("ScheduleInterleaved1F1B", 4, 105),
        ("ScheduleLoopedBFS", 2, 114),
        ("ScheduleLoopedBFS", 4, 105),
    ],
)
def test_torchs_own_schedules_take_as_long_as_calculated(
    name: str, stages_per_rank: int, makespan: int
) -> None:
    rows = repaired_1f1b() if name == "Schedule1F1B" else torch_rows(name, stages_per_rank)
    schedule = parse_csv(csv_of(rows))
    plan = plan_from(schedule, layer_costs(stages_per_rank))
    assert plan.schedule is Schedule.CUSTOM
    report = check(plan)
    assert report.passed, report.failures
    simulation = simulate(plan)
    ideal = 3 * NUM_LAYERS * NUM_MICRO_BATCHES / NUM_RANKS
    assert simulation.step_seconds == pytest.approx(makespan, rel=1e-9)
    assert simulation.bubble == pytest.approx(1 - ideal / makespan, rel=1e-9)
    assert schedule.is_renumbered is (name == "ScheduleLoopedBFS")


@pytest.mark.parametrize(
    "name", ["ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV"]
)
def test_torchs_zero_bubble_schedules_check_and_simulate(name: str) -> None:
    schedule = parse_csv(csv_of(torch_rows(name, 2)))
    in_a_v = (0, 1, 2, 3, 3, 2, 1, 0)
    in_loops = (0, 1, 2, 3, 0, 1, 2, 3)
    assert schedule.stage_ranks == (in_loops if "Interleaved" in name else in_a_v)
    plan = plan_from(schedule, layer_costs(2))
    assert check(plan).passed
    ideal = 3 * NUM_LAYERS * NUM_MICRO_BATCHES / NUM_RANKS
    assert ideal < simulate(plan).step_seconds < 132  # no worse than 1F1B
    assert any(i.opcode is Opcode.BACKWARD_WEIGHT for p in plan.programs for i in p)
    assert parse_plan(print_plan(plan)) == plan


def test_what_torch_prints_for_1f1b_is_refused_by_both_judges() -> None:
    rows = torch_rows("Schedule1F1B", 1)
    with pytest.raises(AssertionError, match="without first running Forward"):
        _validate_schedule(rows, NUM_RANKS, NUM_RANKS, NUM_MICRO_BATCHES)
    with pytest.raises(UsageError, match=r"row 4 \(rank 3\), column .*3B0 has no 3F0 before it"):
        parse_csv(csv_of(rows))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_a_plan_goes_out_and_comes_back(family: tuple[Schedule, int, int, int, int]) -> None:
    plan = plan_of(*family)
    text = print_csv(plan, CsvFormat.COMPUTE_ONLY)
    schedule = parse_csv(text)
    assert parse_csv(print_csv(plan, CsvFormat.COMPUTE_COMMS)) == schedule
    again = plan_from(schedule)
    assert check(again).passed
    assert print_csv(again, CsvFormat.COMPUTE_ONLY) == text
    assert parse_csv(print_csv(again, CsvFormat.COMPUTE_COMMS)) == schedule


def test_costs_are_of_each_stage() -> None:
    schedule = parse_csv("0F0,0I0,0W0\n1F0,1I0,1W0\n")
    costs = StageCosts(
        forward_seconds=(1.0, 2.0),
        backward_seconds=(8.0,),
        backward_weight_seconds=(4.0, 3.0),
        tensor_bytes=5,
        num_parameters=7,
    )
    plan = plan_from(schedule, costs)
    assert [stage.forward_seconds for stage in plan.stages] == [1.0, 2.0]
    assert [stage.backward_weight_seconds for stage in plan.stages] == [4.0, 3.0]
    assert [tensor.num_bytes for tensor in plan.tensors] == [8]
    assert [unit.num_elements for unit in plan.units] == [7, 7]
    assert simulate(plan).step_seconds == pytest.approx(1 + 2 + 5 + 8)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (StageCosts(forward_seconds=(1.0, 2.0, 3.0)), "3 numbers of forward seconds for 2 stages"),
        (StageCosts(backward_weight_seconds=(2.5,)), "takes 2.5 s, the whole 2 s"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: StageCosts, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_from(parse_csv("0F0,0I0,0W0\n1F0,1I0,1W0\n"), costs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no action"),
        (",,\n", "holds no action"),
        ("0F0,0B0\n\n1F0,1B0\n", r"row 2 \(rank 1\) is empty"),
        ("0F0,0B0\n1F0,1X0\n", r"row 2 \(rank 1\), column 2: '1X0' is no action"),
        ("0F0,0B\n", "'0B' is no action"),
        ("0F0,0B0 1F0\n", "is no action"),
        ("0F9999999999\n", "is no action"),
        ("(0F0;0Y0)OVERLAP_F_B\n", "'0Y0' is no action"),
        ("0F0,0B0,1F0\n1B0\n", "stage 1 is on rank 1 here and on rank 0 in row 1"),
        ("0F0,0B0,2F0,2B0\n", "has stage 2, but no stage 1"),
        ("0F0,0F0,0B0\n", r"column 2: 0F0 stands there for the second time"),
        ("0F0,0F1,0B0\n", "stage 0 does F for micro-batch 1"),
        ("0F0,0B0,0F2,0B2\n", "micro-batch 2, but the stages run 2 forwards"),
        ("0B0,0F0\n", "0B0 has no 0F0 before it"),
        ("0F0,0W0,0I0\n", "0W0 has no 0I0 before it"),
        ("0F0,0I0\n", "stage 0 does F, I for micro-batch 0"),
        ("0F0,0B0,0I0,0W0\n", "stage 0 does B, F, I, W for micro-batch 0"),
        ("0UNSHARD\n", "has no forward"),
        ("0F0,0SEND_F0,0B0\n1F0,1B0\n", "has no 1RECV_F0, which 0F0 needs"),
        ("0SEND_F0,0F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n", "0SEND_F0 comes before 0F0"),
        (
            "0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1RECV_F0,1B0,1SEND_B0\n",
            "1RECV_F0 comes after 1F0, which needs it",
        ),
        ("0F0,0SEND_F0,1RECV_F0,1F0,1B0,0B0\n", "0SEND_F0 belongs to no hop between two ranks"),
        ("0F0\0,0B0\n", "is no (CSV|action)"),
        ("0F0" * 50_000, "is no (CSV|action)"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_csv(text)


def words_of(steps: Sequence[ComputeStep]) -> list[tuple[str, int]]:
    return [(step.opcode.value[0], step.micro_batch) for step in steps]


def test_ranks_that_would_wait_for_each_other_break_rule_4() -> None:
    stuck = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n"
    report = check(plan_from(parse_csv(stuck)))
    assert 4 in [verdict.number for verdict in report.failures]


def test_overlapping_actions_come_one_after_the_other() -> None:
    schedule = parse_csv("0F0,0F1,(0B0;0F2)OVERLAP_F_B,,0B1,0B2\r\n\r\n")
    (steps,) = schedule.order.ranks
    assert words_of(steps) == [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)]


def test_micro_batches_are_renumbered_only_where_all_stages_agree() -> None:
    reversed_backward = "0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n"
    schedule = parse_csv(reversed_backward)
    assert schedule.is_renumbered
    assert words_of(schedule.order.ranks[0]) == [("F", 1), ("F", 0), ("B", 0), ("B", 1)]
    differing = parse_csv("0F0,0F1,0B1,0B0\n1F0,1F1,1B0,1B1\n")
    assert not differing.is_renumbered
    report = check(plan_from(differing))
    assert [verdict.number for verdict in report.failures] == [3]


CELLS = st.one_of(
    st.sampled_from(["", "0F0", "0B0", "0I0", "0W0", "1F0", "1B0", "0SEND_F0", "1RECV_F0", "-"]),
    st.text(max_size=8),
)


@given(st.lists(st.lists(CELLS, max_size=6), max_size=3))
def test_any_text_is_read_or_refused_in_words(rows: list[list[str]]) -> None:
    text = "\n".join(",".join(row) for row in rows)
    with contextlib.suppress(UsageError):  # and no other
        assert parse_csv(text).num_micro_batches >= 1
