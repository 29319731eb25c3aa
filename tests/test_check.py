"""The checker on plans that keep every rule, and rules 1 to 4, 8 and 9 on plans that break them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from plan_changes import (
    broken_rules,
    changed,
    counterexample,
    dropped,
    find,
    moved,
    repeated,
    swapped,
    with_buffer,
    with_program,
)
from synthetic import chain_plan

from planner.check import RULES, check
from planner.errors import CheckError, PlanFileError
from planner.plan.code import Reference, Statement
from planner.plan.dependencies import partial_order
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.simulate import simulate

EVERYTHING = PlanOptions(check_finite=True, clip_norm=1.0, save=True)
GOOD: dict[str, Callable[[], Plan]] = {
    "layered": lambda: chain_plan(),
    "one of everything": lambda: chain_plan(1, 1, 1),
    "one of everything, partitioned": lambda: chain_plan(1, 1, 1, num_replicas=2, partition=3),
    "replicas": lambda: chain_plan(2, 2, 1, num_replicas=3),
    "random operators": lambda: chain_plan(8, 4, 2, recompute=True, num_random_operators=2),
    "partitioned": lambda: chain_plan(5, 2, 3, num_replicas=2, partition=3, recompute=True),
    "one buffer": lambda: chain_plan(
        4, 1, 3, num_replicas=2, partition=3, num_weight_buffers=1, num_gradient_buffers=1
    ),
    "tied and skips": lambda: chain_plan(8, 4, 3, tied=((0, 7),), skips=((0, 5), (1, 7), (2, 6))),
    "optimizer partitioned": lambda: chain_plan(5, 2, 3, num_replicas=3, partition=1),
    "gradients partitioned": lambda: chain_plan(
        4, 2, 2, tied=((0, 3),), num_replicas=2, partition=2, options=EVERYTHING
    ),
    "gradients partitioned, offloaded": lambda: chain_plan(
        4, 2, 2, offload_state=True, num_replicas=2, partition=2, options=EVERYTHING
    ),
    "tied, partitioned": lambda: chain_plan(
        8, 4, 3, tied=((0, 4), (0, 7)), num_replicas=2, partition=3
    ),
    "tied on one rank": lambda: chain_plan(4, 2, 3, tied=((0, 2),)),
    "tied twice on one rank": lambda: chain_plan(
        4, 1, 3, tied=((0, 3), (1, 3)), skips=((0, 2), (0, 3))
    ),
    "all options": lambda: chain_plan(options=EVERYTHING),
    "all options, partitioned": lambda: chain_plan(
        4, 2, 2, tied=((0, 3),), num_replicas=2, partition=3, options=EVERYTHING
    ),
    "offloaded state": lambda: chain_plan(offload_state=True),
    "offloaded state, all options": lambda: chain_plan(
        4, 2, 2, offload_state=True, num_replicas=2, partition=3, options=EVERYTHING
    ),
    "offloaded inputs": lambda: chain_plan(offload_inputs=True, recompute=True),
    "GPipe": lambda: chain_plan(3, 3, 4, schedule=Schedule.GPIPE),
    "1F1B": lambda: chain_plan(
        3, 3, 4, schedule=Schedule.ONE_F_ONE_B, num_replicas=2, partition=3, options=EVERYTHING
    ),
    "interleaved": lambda: chain_plan(4, 2, 4, schedule=Schedule.INTERLEAVED, tied=((0, 3),)),
    "hybrid": lambda: chain_plan(4, 2, 5, schedule=Schedule.HYBRID, group_size=3),
    "zero bubble": lambda: chain_plan(3, 3, 4, schedule=Schedule.ZERO_BUBBLE, recompute=True),
    "plain": lambda: chain_plan(
        4, 2, 3, schedule=Schedule.PLAIN, num_replicas=2, partition=3, num_gradient_buffers=1
    ),
    "plain, offloaded": lambda: chain_plan(4, 2, 2, schedule=Schedule.PLAIN, offload_state=True),
}


@pytest.mark.parametrize("name", GOOD)
def test_lowered_plans_keep_every_rule(name: str) -> None:
    plan = GOOD[name]()
    report = check(plan)
    assert report.passed, report.failures[0].counterexample
    assert [verdict.number for verdict in report.verdicts] == list(RULES)
    assert check(plan, partial_order(plan)) == report


def test_rule_1_a_lost_layer() -> None:
    plan = chain_plan()
    assert broken_rules(replace(plan, layer_names=(*plan.layer_names, "head"))) == {1}


def test_rule_1_a_layer_twice_or_out_of_order() -> None:
    plan = chain_plan()
    stages = (replace(plan.stages[0], layers=("layer.0", "layer.1")), *plan.stages[1:])
    assert broken_rules(replace(plan, stages=stages)) == {1}
    names = plan.layer_names
    reordered = replace(plan, layer_names=(names[1], names[0], *names[2:]))
    assert "look at the plan's stages" in counterexample(reordered, 1)


def test_rule_1_a_stage_on_another_rank() -> None:
    plan = chain_plan()
    index = find(plan, 0, Opcode.FORWARD, stage=2)
    assert 1 in broken_rules(changed(plan, 0, index, stage=1))


def test_rule_1_a_tensor_that_two_stages_make() -> None:
    plan = chain_plan()
    twice = replace(plan.stages[1], outputs=(*plan.stages[1].outputs, "h_0"))
    stages = (plan.stages[0], twice, *plan.stages[2:])
    assert 1 in broken_rules(replace(plan, stages=stages))


def test_rule_2_a_forward_dropped_or_repeated() -> None:
    plan = chain_plan()
    index = find(plan, 1, Opcode.FORWARD, stage=1, micro_batch=1)
    assert 2 in broken_rules(dropped(plan, 1, index))
    assert 2 in broken_rules(repeated(plan, 1, index))


def test_rule_2_a_backward_dropped_or_repeated() -> None:
    plan = chain_plan()
    index = find(plan, 1, Opcode.BACKWARD, stage=1, micro_batch=1)
    assert {2, 6} <= broken_rules(dropped(plan, 1, index))
    assert {2, 6} <= broken_rules(repeated(plan, 1, index))


def test_rule_2_recompute_where_none_is_due() -> None:
    plan = chain_plan()
    index = find(plan, 0, Opcode.FORWARD)
    again = replace(plan.programs[0][index], opcode=Opcode.RECOMPUTE, writes=())
    program = list(plan.programs[0])
    program.insert(index + 1, again)
    assert {2, 5} <= broken_rules(with_program(plan, 0, program))


@pytest.mark.parametrize("opcode", [Opcode.BACKWARD_INPUT, Opcode.BACKWARD_WEIGHT])
def test_rule_2_half_a_backward(opcode: Opcode) -> None:
    plan = chain_plan(2, 2, 2, schedule=Schedule.ZERO_BUBBLE)
    index = find(plan, 1, opcode)
    assert 2 in broken_rules(dropped(plan, 1, index))
    assert 2 in broken_rules(repeated(plan, 1, index))


def test_rule_2_the_halves_of_backward_in_the_wrong_order() -> None:
    plan = chain_plan(1, 1, 1, schedule=Schedule.ZERO_BUBBLE)
    one, other = find(plan, 0, Opcode.BACKWARD_INPUT), find(plan, 0, Opcode.BACKWARD_WEIGHT)
    assert broken_rules(swapped(plan, 0, one, other)) == {2}


def test_rule_3_depth_first_order() -> None:
    """Micro-batch 1 of stage 0 after micro-batch 0 of stage 1: correct, but not layered."""
    plan = chain_plan(4, 1, 2)
    one = find(plan, 0, Opcode.FORWARD, stage=0, micro_batch=1)
    other = find(plan, 0, Opcode.FORWARD, stage=1, micro_batch=0)
    depth_first = swapped(plan, 0, one, other)
    assert broken_rules(depth_first) == {3}
    assert broken_rules(replace(depth_first, schedule=Schedule.CUSTOM)) == set()


@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN, Schedule.GPIPE])
def test_rule_3_forward_micro_batches_exchanged(schedule: Schedule) -> None:
    """Running statistics of modules would end up as plain accumulation does not leave them."""
    plan = replace(chain_plan(1, 1, 2, schedule=Schedule.GPIPE), schedule=schedule)
    loads = (find(plan, 0, Opcode.LOAD, micro_batch=m) for m in (0, 1))
    steps = (find(plan, 0, Opcode.FORWARD, micro_batch=m) for m in (0, 1))
    exchanged = swapped(swapped(plan, 0, *loads), 0, *steps)
    assert "micro-batch 0, stands behind" in counterexample(exchanged, 3)
    assert broken_rules(exchanged) == {3}
    assert broken_rules(replace(exchanged, schedule=Schedule.CUSTOM)) == set()


def test_code_is_whole_and_each_layer_is_called_once() -> None:
    plan = chain_plan(2, 1, 1)
    one, other = plan.stages

    def with_code(code: tuple[Statement, ...]) -> Plan:
        return replace(plan, stages=(one, replace(other, code=code)))

    for code in (other.code[1:], other.code[:-1], one.code, (), (*other.code, other.code[0])):
        with pytest.raises(PlanFileError, match="the code of stage 1"):
            check(with_code(code))
    again = replace(one.code[1], arguments=(Reference("h_0"),))
    assert broken_rules(with_code((again, *other.code))) == {1}


def test_rule_6_units_are_their_parameters() -> None:
    plan = chain_plan(1, 1, 1)
    (parameter,) = plan.parameters
    for change in ({"trainable": False}, {"dtype": "float64"}, {"shape": (7,)}):
        changed_plan = replace(plan, parameters=(replace(parameter, **change),))
        assert "differs from its parameters" in counterexample(changed_plan, 6)


def test_tables_that_the_lowering_never_makes() -> None:
    plan = chain_plan(2, 1, 1, num_replicas=2)
    (key,) = plan.batch
    for bad in (
        replace(plan, partition=4),
        replace(plan, num_replicas=1, partition=3),
        replace(plan, batch=(replace(key, shape=(2, 1)),)),
        replace(plan, units=(replace(plan.units[0], ranks=(0, 0)), plan.units[1])),
        replace(plan, stages=(plan.stages[0], replace(plan.stages[1], inputs=("h_0", "h_0")))),
    ):
        with pytest.raises(PlanFileError):
            check(bad)


def test_rule_2_recompute_before_its_forward() -> None:
    """It would find running statistics of modules that its forward never saw."""
    plan = chain_plan(1, 1, 2, recompute=True)
    index = find(plan, 0, Opcode.RECOMPUTE, micro_batch=1)
    forward = find(plan, 0, Opcode.FORWARD, micro_batch=1)
    assert broken_rules(moved(plan, 0, index, forward)) == {2}
    assert broken_rules(moved(plan, 0, index, forward + 1)) == set()


def test_rule_5_buffers_of_a_unit_larger_than_it() -> None:
    """The runtime compares them with the model and refuses any other size."""
    plan = chain_plan(offload_state=True)
    for name in ("shard:stage.0", "host:shard:stage.0", "host:moments:stage.0"):
        (entry,) = (buffer for buffer in plan.buffers[0] if buffer.name == name)
        larger = with_buffer(plan, 0, name, shape=(*entry.shape[:-1], entry.shape[-1] + 1))
        assert broken_rules(larger) == {5}, name


def test_rule_3_backward_micro_batches_reversed() -> None:
    """Sums grow in another order than plain accumulation's: no schedule may do that."""
    plan = chain_plan(1, 1, 3)
    one = find(plan, 0, Opcode.BACKWARD, micro_batch=1)
    other = find(plan, 0, Opcode.BACKWARD, micro_batch=2)
    reversed_plan = swapped(plan, 0, one, other)
    assert broken_rules(reversed_plan) == {3}
    custom = replace(reversed_plan, schedule=Schedule.CUSTOM)
    assert "micro-batch 1 enters sum:float32.0 after 2" in counterexample(custom, 3)


def test_rule_3_recompute_may_stand_earlier() -> None:
    plan = chain_plan(1, 1, 3, recompute=True)
    index = find(plan, 0, Opcode.RECOMPUTE, micro_batch=2)
    before = find(plan, 0, Opcode.BACKWARD, micro_batch=0)
    assert broken_rules(moved(plan, 0, index, before)) == set()


def test_rule_4_missing_ends() -> None:
    plan = chain_plan()
    assert 4 in broken_rules(dropped(plan, 0, find(plan, 0, Opcode.SEND)))
    assert 4 in broken_rules(dropped(plan, 1, find(plan, 1, Opcode.RECEIVE)))
    assert 4 in broken_rules(repeated(plan, 1, find(plan, 1, Opcode.RECEIVE)))
    single = chain_plan(2, 2, 1)
    assert {4, 5} <= broken_rules(dropped(single, 0, find(single, 0, Opcode.SEND)))


def test_rule_4_ends_that_disagree() -> None:
    plan = chain_plan()
    one, other = find(plan, 0, Opcode.SEND), find(plan, 0, Opcode.SEND, 1)
    assert 4 in broken_rules(swapped(plan, 0, one, other))
    index = find(plan, 1, Opcode.RECEIVE)
    assert 4 in broken_rules(changed(plan, 1, index, micro_batch=1))
    assert 4 in broken_rules(changed(plan, 1, index, stage=3))
    assert 4 in broken_rules(changed(plan, 1, index, stage=0))
    with pytest.raises(PlanFileError, match=r"belongs on from\.0"):
        check(changed(plan, 1, index, stream="compute"))
    with pytest.raises(PlanFileError, match="peer 1"):
        check(changed(plan, 1, index, peer=1, stream="from.1"))


@pytest.mark.parametrize("fields", [{"shape": (1, 2)}, {"shape": (1,)}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["h_0", "gradient:h_0"])
def test_rule_4_another_shape_or_type_at_one_end(name: str, fields: dict[str, object]) -> None:
    plan = chain_plan()
    for rank in (0, 1):
        changed_plan = with_buffer(plan, rank, name, **fields)
        assert {4, 5} <= broken_rules(changed_plan)
        assert f"on rank {rank} {name} is" in counterexample(changed_plan, 4)


def test_rule_4_sends_that_swap_or_move_harmlessly() -> None:
    """Both ends of two messages of a pair in the other order; a SEND one compute step later."""
    plan = chain_plan(2, 2, 2)
    ends = [(0, Opcode.SEND), (1, Opcode.RECEIVE)]
    for rank, opcode in ends:
        program = list(plan.programs[rank])
        one, other = find(plan, rank, opcode), find(plan, rank, opcode, 1)
        first, second = program[one], program[other]
        program[other] = first
        program[one] = second
        plan = with_program(plan, rank, program)
    assert {4, 5} & broken_rules(plan)  # h_0.1 is sent before it is made
    plan = chain_plan(2, 2, 2)
    send, forward = find(plan, 0, Opcode.SEND), find(plan, 0, Opcode.FORWARD, micro_batch=1)
    assert broken_rules(moved(plan, 0, send, forward + 1)) == set()


def test_rule_4_a_send_issued_behind_the_compute_that_needs_its_answer() -> None:
    """Streams and buffers alone would let it run, but compute holds up what stands behind it."""
    plan = chain_plan(4, 2, 1)
    send = find(plan, 0, Opcode.SEND, stage=1)
    receive = find(plan, 0, Opcode.RECEIVE, stage=2)
    late = moved(plan, 0, send, find(plan, 0, Opcode.FORWARD, stage=2))
    assert receive < find(late, 0, Opcode.SEND, stage=1)
    # RECEIVE does not hold up what stands behind it; the compute that reads it does.
    assert broken_rules(late) == set()
    late = moved(plan, 0, send, find(plan, 0, Opcode.FORWARD, stage=2) + 1)
    assert broken_rules(late) == {4}
    with pytest.raises(CheckError, match="wait for each other"):
        simulate(late)


def test_rule_4_a_receive_behind_its_own_reader() -> None:
    plan = chain_plan(2, 2, 1)
    receive, forward = find(plan, 1, Opcode.RECEIVE), find(plan, 1, Opcode.FORWARD)
    assert 5 in broken_rules(swapped(plan, 1, receive, forward))


def test_rule_4_collectives_in_another_order() -> None:
    """One rank enters two tied collectives in the other's opposite order."""
    plan = chain_plan(4, 2, 1, tied=((0, 3), (1, 2)))
    calls = [i for i, x in enumerate(plan.programs[0]) if x.opcode is Opcode.REDUCE_TIED]
    assert len(calls) == 2
    deadlocked = swapped(plan, 0, *calls)
    assert broken_rules(deadlocked) == {4}
    notes = {v.number for v in check(deadlocked).verdicts if "before the deadlock" in v.note}
    assert notes == {5, 6, 10}
    shown = counterexample(deadlocked, 4)
    assert "deadlock: 2 instructions wait for each other" in shown
    assert "REDUCE_TIED tied.0 on ranks 0, 1\n  -> REDUCE_TIED tied.1 on ranks 0, 1\n" in shown


def test_rule_4_checks_of_the_whole_model_in_another_order() -> None:
    options = PlanOptions(check_finite=True, clip_norm=1.0)
    plan = chain_plan(2, 2, 1, options=options)
    one, other = find(plan, 0, Opcode.CHECK_FINITE), find(plan, 0, Opcode.CLIP)
    assert broken_rules(swapped(plan, 0, one, other)) == {4}
    plan = chain_plan(1, 1, 1, options=options)
    one, other = find(plan, 0, Opcode.CHECK_FINITE), find(plan, 0, Opcode.CLIP)
    assert broken_rules(swapped(plan, 0, one, other)) == set()


def test_rule_4_a_collective_that_one_rank_does_not_enter() -> None:
    plan = chain_plan(tied=((0, 3),))
    assert {4, 10} <= broken_rules(dropped(plan, 0, find(plan, 0, Opcode.REDUCE_TIED)))
    plan = chain_plan(options=PlanOptions(clip_norm=1.0))
    shown = counterexample(dropped(plan, 0, find(plan, 0, Opcode.CLIP)), 4)
    assert "CLIP is entered by pipeline ranks [1], but [0, 1] must enter it" in shown


def test_rule_8_a_gather_for_every_micro_batch() -> None:
    plan = chain_plan(num_replicas=2, partition=3)
    index = find(plan, 0, Opcode.GATHER)
    twice = repeated(plan, 0, index)
    assert broken_rules(twice) == set()  # as many as two passes may have
    assert broken_rules(repeated(twice, 0, index)) == {8}


def test_rule_8_a_reduction_for_every_micro_batch() -> None:
    plan = chain_plan(num_replicas=2)
    assert {6, 8} <= broken_rules(repeated(plan, 0, find(plan, 0, Opcode.REDUCE)))


def test_rule_8_is_not_claimed_by_plain_accumulation() -> None:
    plan = chain_plan(
        4, 2, 3, schedule=Schedule.PLAIN, num_replicas=2, partition=3,
        num_weight_buffers=1, num_gradient_buffers=1,
    )  # fmt: skip
    assert broken_rules(plan) == set()
    assert check(plan).verdicts[7].note == "plain does not claim it"
    assert {3, 6, 8} <= broken_rules(replace(plan, schedule=Schedule.LAYERED))


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


def test_a_plan_with_dangling_references_is_no_plan() -> None:
    plan = chain_plan()
    with pytest.raises(PlanFileError, match="stage 99"):
        check(changed(plan, 0, find(plan, 0, Opcode.FORWARD), stage=99))
