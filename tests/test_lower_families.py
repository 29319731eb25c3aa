"""Programs of every schedule family: traffic, buffers, and that they can run at all."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import judge
from synthetic import chain_cluster, chain_graph, chain_placement, chain_plan, chain_profile

from planner.errors import UsageError
from planner.lower import lower
from planner.plan.dependencies import partial_order
from planner.plan.names import buffer_key, kind_of
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions
from planner.schedule import ComputeStep, Order, order_of
from planner.schedules import Schedule

FAMILIES = [schedule for schedule in Schedule if schedule is not Schedule.CUSTOM]
ONE_STAGE = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)


def traffic(plan: Plan) -> list[tuple[int, int]]:
    """(gathers, reductions) of each rank."""
    counts = [Counter(i.opcode for i in program) for program in plan.programs]
    return [(count[Opcode.GATHER], count[Opcode.REDUCE]) for count in counts]


def partitioned(*size: int, **placement: object) -> Plan:
    return chain_plan(*size, num_replicas=2, partition=3, **placement)


@pytest.mark.parametrize(
    ("num_layers", "num_micro_batches", "plain", "layered"),
    [
        (4, 4, (18, 16), (6, 4)),
        (8, 4, (50, 32), (14, 8)),
        (16, 8, (226, 128), (30, 16)),
        (160, 5, (1582, 800), (318, 160)),
    ],
)
def test_traffic_of_plain_and_layered_accumulation(
    num_layers: int,
    num_micro_batches: int,
    plain: tuple[int, int],
    layered: tuple[int, int],
) -> None:
    """Two buffers: L + (2 M - 1) (L - 2) gathers and L M reductions against 2 L - 2 and L."""
    size = (num_layers, 1, num_micro_batches)
    assert traffic(partitioned(*size, schedule=Schedule.PLAIN)) == [plain]
    assert traffic(partitioned(*size)) == [layered]


@pytest.mark.parametrize(("num_buffers", "gathers"), [(1, 7), (2, 6), (3, 5), (4, 4)])
def test_traffic_of_a_pipeline_falls_with_buffers(num_buffers: int, gathers: int) -> None:
    plan = partitioned(16, 4, 8, num_weight_buffers=num_buffers)
    assert traffic(plan) == [(gathers, 4)] * 4


def test_traffic_of_depth_first_grows_with_micro_batches() -> None:
    """Each group of P gathers what the group before has driven out, unless nothing ever is."""

    def depth_first(num_micro_batches: int, num_buffers: int) -> tuple[int, int]:
        plan = partitioned(
            16,
            4,
            num_micro_batches,
            schedule=Schedule.INTERLEAVED,
            num_weight_buffers=num_buffers,
            num_gradient_buffers=num_buffers,
        )
        return traffic(plan)[0]

    gathers, reductions = zip(*(depth_first(m, 2) for m in (4, 8, 16)), strict=True)
    assert gathers[0] < gathers[1] < gathers[2]
    assert reductions == (4, 8, 16)
    assert depth_first(16, 4) == (4, 4)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_a_reduction_adds_to_those_before_it(num_micro_batches: int) -> None:
    plan = partitioned(3, 1, num_micro_batches, schedule=Schedule.PLAIN, num_gradient_buffers=1)
    for unit in ("stage.0", "stage.1", "stage.2"):
        program = plan.programs[0]
        reductions = [i for i in program if i.opcode is Opcode.REDUCE and i.unit == unit]
        added = [f"reduced:{unit}" in i.reads for i in reductions]
        assert added == [False] + [True] * (num_micro_batches - 1)


def sums(plan: Plan) -> set[str]:
    names = {name for program in plan.programs for i in program for name in i.writes}
    return {name for name in names if kind_of(name) == "sum"}


def test_sums_share_buffers_only_where_one_is_complete_before_the_next() -> None:
    """One replica: an update empties the buffer, unless it has to wait for the whole gradient."""
    assert len(sums(chain_plan(4, 1, 2))) == 1
    assert len(sums(chain_plan(4, 1, 2, schedule=Schedule.PLAIN))) == 4
    assert len(sums(chain_plan(4, 1, 2, options=PlanOptions(clip_norm=1.0)))) == 4
    assert len(sums(chain_plan(4, 1, 2, options=PlanOptions(check_finite=True)))) == 4
    # Replicas that hold the whole state reduce each unit once, whatever the order.
    plan = chain_plan(4, 1, 2, num_replicas=2, schedule=Schedule.PLAIN)
    assert len(sums(plan)) == 4
    assert traffic(plan) == [(0, 4)]
    assert len(sums(chain_plan(4, 1, 2, num_replicas=2, num_gradient_buffers=3))) == 3


def everything(schedule: Schedule) -> Plan:
    loops = 1 if schedule in ONE_STAGE else 2
    return chain_plan(
        2 * loops,
        2,
        2,
        schedule=schedule,
        group_size=2,
        recompute=True,
        tied=[(0, 2 * loops - 1)],
        skips=[(0, 3)] if loops == 2 else [],
        saved_bytes=64,
        num_elements=3,
        options=PlanOptions(clip_norm=1.0, check_finite=True, save=True),
        num_replicas=2,
        partition=3,
    )


@pytest.mark.parametrize("schedule", FAMILIES)
def test_the_oracle_finds_nothing_wrong(schedule: Schedule) -> None:
    plan = everything(schedule)
    assert plan.schedule is schedule
    result = judge(plan, max_states=300)
    assert result.num_states >= 300 or result.complete
    assert result.faults == ()


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A random chain on a random mesh, under any family and options."""
    schedule = draw(st.sampled_from(FAMILIES))
    num_ranks, loops = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_stages = num_ranks * (1 if schedule in ONE_STAGE else loops)
    if schedule in (Schedule.LAYERED, Schedule.PLAIN, Schedule.FORWARD):
        num_stages = draw(st.integers(num_ranks, 3 * num_ranks))
    last = num_stages - 1
    pairs = st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted).map(tuple)
    tied = draw(st.lists(pairs.filter(lambda p: p[0] < p[1]), max_size=2)) if last else []
    skips = draw(st.sets(pairs.filter(lambda p: p[0] + 1 < p[1]), max_size=2)) if last > 1 else ()
    options = PlanOptions(
        check_finite=draw(st.booleans()),
        clip_norm=draw(st.sampled_from([None, 1.0])),
        save=draw(st.booleans()),
    )
    try:
        return chain_plan(
            num_stages,
            num_ranks,
            draw(st.integers(1, 8)),
            tied=tied,
            skips=sorted(skips),
            num_elements=draw(st.integers(1, 5)),
            options=options,
            schedule=schedule,
            group_size=draw(st.integers(1, 8)),
            num_replicas=draw(st.integers(1, 3)),
            partition=draw(st.integers(0, 3)),
            recompute=draw(st.booleans()),
            num_weight_buffers=draw(st.integers(1, 4)),
            num_gradient_buffers=draw(st.integers(1, 4)),
            offload_state=draw(st.booleans()),
            offload_inputs=draw(st.booleans()),
        )
    except UsageError:
        assert schedule in (Schedule.INTERLEAVED, Schedule.HYBRID)
        assume(False)
        raise


@given(plan=plans())
def test_every_plan_is_matched_acyclic_and_named_in_its_table(plan: Plan) -> None:
    assert bool(plan.evaluation) == (plan.schedule is not Schedule.FORWARD)
    for found in (plan, plan.forward_only()) if plan.evaluation else (plan,):
        order = partial_order(found)
        assert order.mismatches == []
        assert len(order.sorted_tasks()) == len(order.members)
        traffic_bound(found)
    for rank, table in enumerate(plan.buffers):
        programs = (plan.programs[rank], *plan.evaluation[rank : rank + 1])
        named = {name for p in programs for i in p for name in (*i.reads, *i.writes)}
        assert [buffer.name for buffer in table] == sorted(set(map(buffer_key, named)))


def traffic_bound(plan: Plan) -> None:
    """Rule 8: in the layered order state traffic does not grow with micro-batches."""
    if plan.schedule not in (Schedule.LAYERED, Schedule.FORWARD):
        return
    passes = 2 if plan.schedule is Schedule.LAYERED else 1
    users = {unit.name: unit.stages for unit in plan.units}
    for rank, program in enumerate(plan.programs):
        for unit, number in Counter(i.unit for i in program if i.opcode is Opcode.GATHER).items():
            local = sum(plan.stages[stage].rank == rank for stage in users[unit or ""])
            assert number <= passes * local
        assert set(Counter(i.unit for i in program if i.opcode is Opcode.REDUCE).values()) <= {1}


def fewest(plan: Plan, opcode: Opcode) -> list[int]:
    """How many compute instructions stand between each `opcode` and the first reader of its
    result."""
    found = []
    for program in plan.programs:
        for index, instruction in enumerate(program):
            if instruction.opcode is opcode:
                compute = [i for i in program[index + 1 :] if i.stream == "compute"]
                reader = next(
                    at for at, i in enumerate(compute) if set(i.reads) & set(instruction.writes)
                )
                found.append(reader)
    return found


def test_transfers_are_issued_ahead_of_their_readers() -> None:
    plan = chain_plan(8, 4, 8, schedule=Schedule.INTERLEAVED)
    ahead = Counter(fewest(plan, Opcode.RECEIVE))
    assert ahead[2] + ahead[3] + ahead[4] > sum(ahead.values()) / 2
    assert min(ahead) == 0  # a program's first steps have nothing to be ahead of


def test_a_custom_order_may_place_stages_anywhere_and_mix_split_and_whole_backwards() -> None:
    """Stages 0 and 3 on rank 0, 1 and 2 on rank 1, the second micro-batch split."""
    graph = chain_graph(4, tied=[(0, 3)])
    placement = replace(chain_placement(4, 2, 2), stage_ranks=(0, 1, 1, 0))

    def steps(*stages: int) -> tuple[ComputeStep, ...]:
        def step(opcode: Opcode, stage: int, micro_batch: int) -> ComputeStep:
            return ComputeStep(opcode=opcode, stage=stage, micro_batch=micro_batch)

        forward = [step(Opcode.FORWARD, s, m) for s in stages for m in (1, 0)]
        whole = [step(Opcode.BACKWARD, s, 0) for s in reversed(stages)]
        inputs = [step(Opcode.BACKWARD_INPUT, s, 1) for s in reversed(stages)]
        weights = [step(Opcode.BACKWARD_WEIGHT, s, 1) for s in stages]
        return (*forward, *whole, *inputs, *weights)

    order = Order(ranks=(steps(0, 3), steps(1, 2)))
    options = PlanOptions()
    plan = lower(graph, chain_profile(graph), chain_cluster(2), placement, options, order)
    assert plan.schedule is Schedule.CUSTOM
    assert [stage.rank for stage in plan.stages] == [0, 1, 1, 0]
    assert not any(unit.exact for unit in plan.units)
    result = judge(plan, max_states=2000)
    assert result.faults == ()
    peers = [(i.opcode, i.stage) for i in plan.programs[1] if i.peer is not None]
    assert Counter(stage for _, stage in peers) == {1: 2, 3: 2, 2: 2, 0: 2}


def test_a_custom_order_of_a_family_makes_the_same_programs() -> None:
    graph = chain_graph(4)
    placement = chain_placement(4, 2, 4, schedule=Schedule.INTERLEAVED, recompute=True)
    arguments = (graph, chain_profile(graph), chain_cluster(2), placement, PlanOptions())
    family, custom = lower(*arguments), lower(*arguments, order_of(placement))
    assert custom == replace(family, schedule=Schedule.CUSTOM)


def test_evaluation_keeps_nothing_for_backward() -> None:
    plan = chain_plan(4, 2, 3, num_replicas=2, partition=3)
    opcodes = {i.opcode for program in plan.evaluation for i in program}
    assert opcodes == {
        Opcode.LOAD, Opcode.GATHER, Opcode.RELEASE, Opcode.FORWARD, Opcode.SEND, Opcode.RECEIVE
    }  # fmt: skip
    written = {name for program in plan.evaluation for i in program for name in i.writes}
    assert not {name for name in written if kind_of(name) == "saved"}
    assert {f"loss.{m}" for m in range(3)} <= written
    alone = chain_plan(4, 2, 3, num_replicas=2, partition=3, schedule=Schedule.FORWARD)
    assert alone.programs == plan.evaluation
    assert alone.evaluation == ()


def test_the_split_backward_shares_its_operands_with_the_whole_one() -> None:
    def operands(schedule: Schedule, opcode: Opcode) -> list[Instruction]:
        plan = chain_plan(2, 2, 1, schedule=schedule, tied=[(0, 1)])
        return [i for program in plan.programs for i in program if i.opcode is opcode]

    whole = operands(Schedule.ONE_F_ONE_B, Opcode.BACKWARD)
    inputs = operands(Schedule.ZERO_BUBBLE, Opcode.BACKWARD_INPUT)
    weights = operands(Schedule.ZERO_BUBBLE, Opcode.BACKWARD_WEIGHT)
    for both, one, other in zip(whole, inputs, weights, strict=True):
        assert set(one.reads) | set(other.reads) == set(both.reads)
        assert set(one.writes) | set(other.writes) == set(both.writes)
        assert set(one.writes).isdisjoint(other.writes)
