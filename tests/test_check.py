"""Every rule of the checker: plans that keep it, and plans that break it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from synthetic import chain_cluster, chain_graph, chain_placement, chain_profile

from planner.check import RULES, check
from planner.errors import PlanFileError
from planner.lower import lower
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions, Prediction
from planner.simulate import simulate


def chain_plan(
    num_stages: int = 4,
    num_pipeline_ranks: int = 2,
    num_micro_batches: int = 2,
    *,
    tied: tuple[tuple[int, int], ...] = (),
    skips: tuple[tuple[int, int], ...] = (),
    num_random_operators: int = 0,
    **placement: int,
) -> Plan:
    graph = chain_graph(
        num_stages, tied=tied, skips=skips, num_random_operators=num_random_operators
    )
    placed = chain_placement(num_stages, num_pipeline_ranks, num_micro_batches, **placement)
    cluster = chain_cluster(placed.world_size)
    return lower(graph, chain_profile(graph), cluster, placed, PlanOptions())


def broken_rules(plan: Plan) -> set[int]:
    return {verdict.number for verdict in check(plan).failures}


def find(plan: Plan, rank: int, opcode: Opcode, number: int = 0, **fields: object) -> int:
    """Index of an instruction in a rank's program."""
    return [
        index
        for index, instruction in enumerate(plan.programs[rank])
        if instruction.opcode is opcode
        and all(getattr(instruction, name) == value for name, value in fields.items())
    ][number]


def with_program(plan: Plan, rank: int, program: list[Instruction]) -> Plan:
    programs = list(plan.programs)
    programs[rank] = tuple(program)
    return replace(plan, programs=tuple(programs))


def dropped(plan: Plan, rank: int, index: int) -> Plan:
    program = list(plan.programs[rank])
    del program[index]
    return with_program(plan, rank, program)


def repeated(plan: Plan, rank: int, index: int) -> Plan:
    program = list(plan.programs[rank])
    program.insert(index + 1, program[index])
    return with_program(plan, rank, program)


def swapped(plan: Plan, rank: int, one: int, other: int) -> Plan:
    program = list(plan.programs[rank])
    program[one], program[other] = program[other], program[one]
    return with_program(plan, rank, program)


def changed(plan: Plan, rank: int, index: int, **fields: object) -> Plan:
    program = list(plan.programs[rank])
    program[index] = replace(program[index], **fields)  # type: ignore[arg-type]
    return with_program(plan, rank, program)


GOOD: list[Callable[[], Plan]] = [
    lambda: chain_plan(),
    lambda: chain_plan(1, 1, 1),
    lambda: chain_plan(1, 1, 1, num_replicas=2, partition=3),
    lambda: chain_plan(2, 2, 1, num_replicas=3),
    lambda: chain_plan(8, 4, 3),
    lambda: chain_plan(8, 4, 2, recompute=True, num_random_operators=2),
    lambda: chain_plan(5, 2, 3, num_replicas=2, partition=3, recompute=True),
    lambda: chain_plan(4, 1, 3, num_replicas=2, partition=3, num_weight_buffers=1),
    lambda: chain_plan(8, 4, 3, tied=((0, 7),), skips=((0, 5), (1, 7), (2, 6))),
    lambda: chain_plan(8, 4, 3, tied=((0, 4), (0, 7)), num_replicas=2, partition=3),
    lambda: chain_plan(4, 2, 3, tied=((0, 2),)),
    lambda: chain_plan(4, 1, 3, tied=((0, 3), (1, 3)), skips=((0, 2), (0, 3))),
]


@pytest.mark.parametrize("make", GOOD)
def test_lowered_plans_keep_every_rule(make: Callable[[], Plan]) -> None:
    report = check(make())
    assert report.passed, report.failures[0].counterexample
    assert [verdict.number for verdict in report.verdicts] == list(RULES)


def test_rule_1_a_lost_layer() -> None:
    plan = chain_plan()
    assert broken_rules(replace(plan, layer_names=(*plan.layer_names, "head"))) == {1}


def test_rule_1_a_layer_twice() -> None:
    plan = chain_plan()
    stages = (replace(plan.stages[0], layers=("layer.0", "layer.1")), *plan.stages[1:])
    assert broken_rules(replace(plan, stages=stages)) == {1}


def test_rule_1_a_stage_on_another_rank() -> None:
    plan = chain_plan()
    index = find(plan, 0, Opcode.FORWARD, stage=2)
    assert 1 in broken_rules(changed(plan, 0, index, stage=1))


def test_rule_2_a_forward_dropped_or_repeated() -> None:
    plan = chain_plan()
    index = find(plan, 1, Opcode.FORWARD, stage=1, micro_batch=1)
    assert {2, 3} <= broken_rules(dropped(plan, 1, index))
    assert {2, 3} <= broken_rules(repeated(plan, 1, index))


def test_rule_2_recompute_where_none_is_due() -> None:
    plan = chain_plan()
    index = find(plan, 0, Opcode.FORWARD)
    again = replace(plan.programs[0][index], opcode=Opcode.RECOMPUTE, writes=())
    program = list(plan.programs[0])
    program.insert(index + 1, again)
    assert {2, 3} <= broken_rules(with_program(plan, 0, program))


def test_rule_3_depth_first_order() -> None:
    """Micro-batch 1 of stage 0 after micro-batch 0 of stage 2: correct, but not layered."""
    plan = chain_plan(4, 1, 2)
    one = find(plan, 0, Opcode.FORWARD, stage=0, micro_batch=1)
    other = find(plan, 0, Opcode.FORWARD, stage=1, micro_batch=0)
    assert broken_rules(swapped(plan, 0, one, other)) == {3}


def test_rule_3_backward_micro_batches_reversed() -> None:
    plan = chain_plan(1, 1, 3)
    one = find(plan, 0, Opcode.BACKWARD, micro_batch=1)
    other = find(plan, 0, Opcode.BACKWARD, micro_batch=2)
    assert broken_rules(swapped(plan, 0, one, other)) == {3}


def test_rule_4_missing_ends() -> None:
    plan = chain_plan()
    assert {4, 5} <= broken_rules(dropped(plan, 0, find(plan, 0, Opcode.SEND)))
    assert {4, 5} <= broken_rules(dropped(plan, 1, find(plan, 1, Opcode.RECEIVE)))
    assert 4 in broken_rules(repeated(plan, 1, find(plan, 1, Opcode.RECEIVE)))


def test_rule_4_ends_that_disagree() -> None:
    plan = chain_plan()
    one, other = find(plan, 0, Opcode.SEND), find(plan, 0, Opcode.SEND, 1)
    assert 4 in broken_rules(swapped(plan, 0, one, other))
    index = find(plan, 1, Opcode.RECEIVE)
    assert 4 in broken_rules(changed(plan, 1, index, micro_batch=1))
    assert 4 in broken_rules(changed(plan, 1, index, stream="compute"))


def test_rule_4_a_send_issued_behind_the_compute_that_needs_its_answer() -> None:
    """The streams alone would let it run; one thread that waits for compute never issues it."""
    plan = chain_plan(4, 2, 1)
    program = list(plan.programs[0])
    send = program.pop(find(plan, 0, Opcode.SEND, stage=1))
    program.insert(find(plan, 0, Opcode.FORWARD, stage=2), send)
    late = with_program(plan, 0, program)
    assert simulate(late).step_seconds == simulate(plan).step_seconds
    assert broken_rules(late) == {4}


def test_rule_4_a_receive_behind_its_own_reader() -> None:
    plan = chain_plan(2, 2, 1)
    receive, forward = find(plan, 1, Opcode.RECEIVE), find(plan, 1, Opcode.FORWARD)
    assert 5 in broken_rules(swapped(plan, 1, receive, forward))


def test_rule_4_a_deadlock_is_shown_as_a_circle() -> None:
    """One rank enters two tied collectives in the other's opposite order."""
    plan = chain_plan(4, 2, 1, tied=((0, 3), (1, 2)))
    calls = [i for i, x in enumerate(plan.programs[0]) if x.opcode is Opcode.REDUCE_TIED]
    assert len(calls) == 2
    report = check(swapped(plan, 0, *calls))
    verdict = report.verdicts[3]
    assert not verdict.passed
    assert "deadlock" in verdict.counterexample
    assert "->" in verdict.counterexample


def test_rule_4_a_collective_that_one_rank_does_not_enter() -> None:
    plan = chain_plan(tied=((0, 3),))
    assert {4, 10} <= broken_rules(dropped(plan, 0, find(plan, 0, Opcode.REDUCE_TIED)))


def test_rule_5_read_before_written() -> None:
    plan = chain_plan()
    assert 5 in broken_rules(dropped(plan, 0, find(plan, 0, Opcode.LOAD)))
    plan = chain_plan(num_replicas=2, partition=3)
    assert 5 in broken_rules(dropped(plan, 0, find(plan, 0, Opcode.GATHER)))


def test_rule_5_a_gather_that_overwrites_weights_in_use() -> None:
    plan = chain_plan(num_replicas=2, partition=3)
    index = find(plan, 0, Opcode.GATHER)
    buffer = plan.programs[0][index].writes[0]
    other = next(unit.name for unit in plan.units if unit.ranks == (0,) and unit.stages != (0,))
    gather = replace(
        plan.programs[0][index], unit=other, reads=(f"shard:{other}",), writes=(buffer,)
    )
    program = list(plan.programs[0])
    program.insert(find(plan, 0, Opcode.FORWARD, 1), gather)
    assert 5 in broken_rules(with_program(plan, 0, program))


def test_rule_5_weights_read_after_release() -> None:
    plan = chain_plan(num_replicas=2, partition=3)
    release = find(plan, 0, Opcode.RELEASE)
    forward = find(plan, 0, Opcode.FORWARD, 1)
    program = list(plan.programs[0])
    program.insert(forward, program.pop(release))
    assert 5 in broken_rules(with_program(plan, 0, program))


def test_rule_5_weights_already_updated() -> None:
    plan = chain_plan()
    update = find(plan, 0, Opcode.UPDATE, unit="stage.2")
    backward = find(plan, 0, Opcode.BACKWARD, stage=2, micro_batch=1)
    assert {5, 6} <= broken_rules(swapped(plan, 0, update, backward))


def test_rule_5_a_gradient_sum_overwritten() -> None:
    """With one buffer, the next stage's backward must wait for the reduction."""
    plan = chain_plan(num_replicas=2, num_gradient_buffers=1)
    reduce = find(plan, 0, Opcode.REDUCE, unit="stage.2")
    backward = find(plan, 0, Opcode.BACKWARD, stage=0, micro_batch=0)
    program = list(plan.programs[0])
    program.insert(backward, program.pop(reduce))
    assert {5, 6} & broken_rules(with_program(plan, 0, program))


def test_rule_5_a_skip_gradient_that_misses_a_reader() -> None:
    plan = chain_plan(skips=((0, 2),))
    index = find(plan, 0, Opcode.BACKWARD, stage=0)
    reads = tuple(b for b in plan.programs[0][index].reads if "skip" not in b)
    assert 5 in broken_rules(changed(plan, 0, index, reads=reads))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rule_6_a_micro_batch_left_out_or_added_twice(num_replicas: int) -> None:
    plan = chain_plan(num_replicas=num_replicas)
    index = find(plan, 0, Opcode.BACKWARD, stage=2, micro_batch=1)
    reads = tuple(b for b in plan.programs[0][index].reads if not b.startswith("sum:"))
    assert 6 in broken_rules(changed(plan, 0, index, reads=reads))
    assert 6 in broken_rules(repeated(plan, 0, index))


def test_rule_6_updates_and_reductions_missing_or_repeated() -> None:
    plan = chain_plan(num_replicas=2)
    for opcode in (Opcode.UPDATE, Opcode.REDUCE):
        assert 6 in broken_rules(dropped(plan, 0, find(plan, 0, opcode)))
        assert 6 in broken_rules(repeated(plan, 0, find(plan, 0, opcode)))


def test_rule_6_a_parameter_that_no_unit_holds() -> None:
    plan = chain_plan()
    units = (replace(plan.units[0], parameters=()), *plan.units[1:])
    assert broken_rules(replace(plan, units=units)) == {6}


def test_rule_7_memory_over_the_limit() -> None:
    plan = chain_plan()
    peaks = simulate(plan).peak_bytes

    def limited(limit: int) -> Plan:
        prediction = Prediction(
            step_seconds=1.0,
            bubble=0.0,
            peak_bytes=peaks,
            memory_limit_bytes=limit,
            provenance="made up",
        )
        return replace(plan, prediction=prediction)

    assert broken_rules(limited(max(peaks))) == set()
    assert broken_rules(limited(max(peaks) - 1)) == {7}
    assert check(plan).verdicts[6].note == "the plan names no limit"


def test_rule_8_a_gather_for_every_micro_batch() -> None:
    plan = chain_plan(num_replicas=2, partition=3)
    index = find(plan, 0, Opcode.GATHER)
    assert broken_rules(repeated(repeated(plan, 0, index), 0, index)) == {8}


def test_rule_8_a_reduction_for_every_micro_batch() -> None:
    plan = chain_plan(num_replicas=2)
    assert {6, 8} <= broken_rules(repeated(plan, 0, find(plan, 0, Opcode.REDUCE)))


@pytest.mark.parametrize("first", [1, 3])
def test_rule_9_keys_drawn_twice_or_lost(first: int) -> None:
    plan = chain_plan(num_random_operators=2)
    stage = plan.stages[1]
    code = tuple(
        replace(s, first_random_operator=first) if s.num_random_operators else s for s in stage.code
    )
    stages = (plan.stages[0], replace(stage, code=code), *plan.stages[2:])
    assert broken_rules(replace(plan, stages=stages)) == {9}


def test_rule_9_more_operators_than_the_stages_run() -> None:
    plan = chain_plan(num_random_operators=2)
    assert broken_rules(replace(plan, num_random_operators=9)) == {9}
    assert broken_rules(replace(plan, num_random_operators=7)) == {9}


def test_rule_10_tied_gradients_that_are_not_added() -> None:
    """What others do silently: each rank updates its copy with its own gradient."""
    plan = chain_plan(tied=((0, 3),))
    for rank in (0, 1):
        index = find(plan, rank, Opcode.UPDATE, unit="tied.0")
        reads = ("sum:tied.0.0", "shard:tied.0", "weights:tied.0")
        plan = dropped(changed(plan, rank, index, reads=reads), rank, index - 1)
    assert {6, 10} <= broken_rules(plan)


def test_rule_10_a_rank_that_uses_a_tied_unit_without_holding_it() -> None:
    plan = chain_plan(tied=((0, 3),))
    units = tuple(replace(u, ranks=(0,)) if u.name == "tied.0" else u for u in plan.units)
    assert 10 in broken_rules(replace(plan, units=units))


def test_the_counterexample_shows_the_programs_and_marks_the_cell() -> None:
    plan = chain_plan()
    send = find(plan, 0, Opcode.SEND, 1)
    verdict = check(dropped(plan, 0, send)).verdicts[3]
    message, head, *rows = verdict.counterexample.splitlines()
    assert "sends h_2.0 where rank 1 expects h_0.1" in message
    assert head.split(" | ")[0].startswith("rank 1")
    assert sum(row.count(">>>") for row in rows) == 2
    assert any(">>> RECEIVE h_0.1 from 0 <<<" in row for row in rows)


def test_a_plan_with_dangling_references_is_no_plan() -> None:
    plan = chain_plan()
    with pytest.raises(PlanFileError, match="stage 99"):
        check(changed(plan, 0, find(plan, 0, Opcode.FORWARD), stage=99))
