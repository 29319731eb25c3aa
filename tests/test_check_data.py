"""Rules 5, 6 and 10: what buffers hold, on plans that break them and on plans that do no harm."""

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

from planner.plan.types import Instruction, Opcode, Plan, PlanOptions
from planner.schedules import Schedule


def test_rule_5_read_before_written() -> None:
    plan = chain_plan()
    assert broken_rules(dropped(plan, 0, find(plan, 0, Opcode.LOAD))) == {5}
    plan = chain_plan(num_replicas=2, partition=3)
    assert broken_rules(dropped(plan, 0, find(plan, 0, Opcode.GATHER))) == {5}


def test_rule_5_harmless_changes_pass() -> None:
    plan = chain_plan(num_replicas=2, partition=3)
    load = find(plan, 0, Opcode.LOAD)
    assert broken_rules(repeated(plan, 0, load)) == set()
    assert broken_rules(dropped(plan, 0, find(plan, 0, Opcode.RELEASE))) == set()
    assert broken_rules(moved(plan, 0, load, 0)) == set()
    assert broken_rules(changed(plan, 0, load, stage=3)) == set()
    update = find(plan, 0, Opcode.UPDATE)
    program = list(plan.programs[0])
    program[update] = replace(program[update], reads=tuple(reversed(program[update].reads)))
    assert broken_rules(with_program(plan, 0, program)) == set()


@pytest.mark.parametrize(
    ("opcode", "fields"),
    [
        (Opcode.FORWARD, {"reads": ("weights:stage.0",)}),
        (Opcode.FORWARD, {"reads": ("batch:x.0", "weights:stage.0", "batch:x.1")}),
        (Opcode.FORWARD, {"reads": ("batch:x.0", "batch:x.0", "weights:stage.0")}),
        (Opcode.FORWARD, {"reads": ("batch:x.0", "weights:stage.2")}),
        (Opcode.FORWARD, {"writes": ("h_0.0",)}),
        (Opcode.FORWARD, {"writes": ("h_0.1", "saved:0.0")}),
        (Opcode.FORWARD, {"micro_batch": 1}),
        (Opcode.BACKWARD, {"writes": ()}),
        (Opcode.LOAD, {"writes": ()}),
        (Opcode.LOAD, {"writes": ("h_0.0",)}),
        (Opcode.LOAD, {"reads": ("h_0.0",)}),
        (Opcode.LOAD, {"micro_batch": 1}),
        (Opcode.UPDATE, {"writes": ("shard:stage.2", "moments:stage.2")}),
        (Opcode.UPDATE, {"reads": ("sum:float32.0", "shard:stage.2", "weights:stage.2")}),
        (Opcode.UPDATE, {"unit": "stage.0"}),
    ],
)
def test_rule_5_other_operands(opcode: Opcode, fields: dict[str, object]) -> None:
    plan = chain_plan()
    broken = broken_rules(changed(plan, 0, find(plan, 0, opcode), **fields))
    assert 5 in broken


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
    release, forward = find(plan, 0, Opcode.RELEASE), find(plan, 0, Opcode.FORWARD, 1)
    assert 5 in broken_rules(moved(plan, 0, release, forward))


def test_rule_5_gathers_and_releases_where_weights_stay_in_place() -> None:
    plan = chain_plan()
    program = list(plan.programs[0])
    weights = ("weights:stage.0",)
    release = Instruction(
        opcode=Opcode.RELEASE, stream="compute", unit="stage.0", reads=weights, writes=weights
    )
    gather = Instruction(
        opcode=Opcode.GATHER, stream="data", unit="stage.0",
        reads=("shard:stage.0",), writes=weights,
    )  # fmt: skip
    assert broken_rules(with_program(plan, 0, [gather, *program])) == {5}
    assert broken_rules(with_program(plan, 0, [*program, release])) == {5}


def test_rule_5_weights_already_updated() -> None:
    plan = chain_plan()
    update = find(plan, 0, Opcode.UPDATE, unit="stage.2")
    backward = find(plan, 0, Opcode.BACKWARD, stage=2, micro_batch=1)
    assert {5, 6} <= broken_rules(swapped(plan, 0, update, backward))


def test_rule_5_a_gradient_sum_overwritten() -> None:
    """With one buffer, the next stage's backward must wait for the reduction."""
    plan = chain_plan(num_replicas=2, num_gradient_buffers=1)
    reduce = find(plan, 0, Opcode.REDUCE, unit="stage.2")
    late = moved(plan, 0, reduce, find(plan, 0, Opcode.BACKWARD, stage=0, micro_batch=0) + 1)
    assert {5, 6} <= broken_rules(late)
    assert "is overwritten while it holds the sum of stage.2" in counterexample(late, 5)


def test_rule_5_a_skip_gradient_that_misses_a_reader() -> None:
    plan = chain_plan(skips=((0, 2),))
    index = find(plan, 0, Opcode.BACKWARD, stage=0)
    reads = tuple(b for b in plan.programs[0][index].reads if "skip" not in b)
    assert 5 in broken_rules(changed(plan, 0, index, reads=reads))


def test_rule_5_a_gradient_without_all_later_readers() -> None:
    """Stage 1's part of the skip tensor's gradient is missing when stage 0 reads it."""
    plan = chain_plan(3, 1, 1, skips=((0, 2),))
    readers = (replace(plan.stages[1], inputs=(*plan.stages[1].inputs, "skip_0_2")),)
    stages = (plan.stages[0], *readers, plan.stages[2])
    assert 5 in broken_rules(replace(plan, stages=stages))
    program = [
        replace(i, reads=(*i.reads, "skip_0_2.0")) if i.stage == 1 and i.opcode is Opcode.FORWARD
        else i
        for i in plan.programs[0]
    ]  # fmt: skip
    shown = counterexample(with_program(replace(plan, stages=stages), 0, program), 5)
    assert "gradient:skip_0_2.0" in shown


@pytest.mark.parametrize("fields", [{"shape": (0,)}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize(
    "name", ["weights:float32.0", "sum:float32.0", "shard:stage.0", "moments:stage.2",
             "reduced:stage.0", "batch:x", "saved:2"],
)  # fmt: skip
def test_rule_5_buffers_that_cannot_hold_their_content(
    name: str, fields: dict[str, object]
) -> None:
    plan = chain_plan(num_replicas=2, partition=3, saved_bytes=4)
    assert 5 in broken_rules(with_buffer(plan, 0, name, **fields))


@pytest.mark.parametrize("name", ["weights:float32.0", "sum:float32.0", "saved:2"])
def test_rule_5_larger_buffers_do_no_harm(name: str) -> None:
    plan = chain_plan(num_replicas=2, partition=3, saved_bytes=4)
    assert broken_rules(with_buffer(plan, 0, name, shape=(100,))) == set()


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rule_6_a_micro_batch_left_out_or_added_twice(num_replicas: int) -> None:
    plan = chain_plan(num_replicas=num_replicas)
    index = find(plan, 0, Opcode.BACKWARD, stage=2, micro_batch=1)
    reads = tuple(b for b in plan.programs[0][index].reads if not b.startswith("sum:"))
    left_out = changed(plan, 0, index, reads=reads)
    assert {5, 6} <= broken_rules(left_out)
    assert "stage 2, micro-batch 0 added 0 times" in counterexample(left_out, 6)
    assert 6 in broken_rules(repeated(plan, 0, index))


def test_rule_6_updates_and_reductions_missing_or_repeated() -> None:
    plan = chain_plan(num_replicas=2)
    for opcode in (Opcode.UPDATE, Opcode.REDUCE):
        assert 6 in broken_rules(dropped(plan, 0, find(plan, 0, opcode)))
        assert 6 in broken_rules(repeated(plan, 0, find(plan, 0, opcode)))


def test_rule_6_a_reduction_before_the_last_backward() -> None:
    plan = chain_plan(num_replicas=2)
    reduce = find(plan, 0, Opcode.REDUCE, unit="stage.2")
    early = moved(plan, 0, reduce, find(plan, 0, Opcode.BACKWARD, stage=2, micro_batch=1))
    assert "stage 2, micro-batch 1 added 0 times" in counterexample(early, 6)


def test_rule_6_a_parameter_that_no_unit_holds() -> None:
    plan = chain_plan()
    units = (replace(plan.units[0], parameters=()), *plan.units[1:])
    assert broken_rules(replace(plan, units=units)) == {5, 6}  # its moments are too many


def plain_partitioned() -> Plan:
    """Sums give way to other stages', so each micro-batch's is reduced by itself."""
    return chain_plan(
        4, 2, 3, schedule=Schedule.PLAIN, num_replicas=2, partition=3,
        num_weight_buffers=1, num_gradient_buffers=1,
    )  # fmt: skip


def test_rule_6_a_partial_reduction_lost() -> None:
    plan = plain_partitioned()
    assert broken_rules(plan) == set()
    for number in range(3):
        index = find(plan, 0, Opcode.REDUCE, number, unit="stage.2")
        assert 6 in broken_rules(dropped(plan, 0, index))
        assert {5, 6} & broken_rules(repeated(plan, 0, index))


def test_rule_6_a_partial_reduction_that_forgets_the_earlier_ones() -> None:
    plan = plain_partitioned()
    index = find(plan, 0, Opcode.REDUCE, 2, unit="stage.2")
    assert "reduced:stage.2" in plan.programs[0][index].reads
    reads = tuple(b for b in plan.programs[0][index].reads if b.startswith("sum:"))
    assert broken_rules(changed(plan, 0, index, reads=reads)) == {6}


CHECKED = PlanOptions(check_finite=True, clip_norm=1.0, save=True)


def checked_plan(num_replicas: int = 2) -> Plan:
    partition = 3 if num_replicas > 1 else 0
    return chain_plan(2, 1, 2, num_replicas=num_replicas, partition=partition, options=CHECKED)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("opcode", [Opcode.CLIP, Opcode.CHECK_FINITE])
def test_rule_6_a_check_before_the_last_gradient(opcode: Opcode, num_replicas: int) -> None:
    plan = checked_plan(num_replicas)
    last = find(plan, 0, Opcode.REDUCE if num_replicas > 1 else Opcode.BACKWARD, -1)
    early = moved(plan, 0, find(plan, 0, opcode), last)
    assert {5, 6} & broken_rules(early)
    assert broken_rules(plan) == set()


@pytest.mark.parametrize("opcode", [Opcode.CLIP, Opcode.CHECK_FINITE])
def test_rule_6_a_check_left_out_or_not_asked_for(opcode: Opcode) -> None:
    plan = checked_plan()
    index = find(plan, 0, opcode)
    assert {5, 6} <= broken_rules(dropped(plan, 0, index))
    assert broken_rules(repeated(plan, 0, index)) == {6}
    plan = replace(plan, options=PlanOptions())
    assert {5, 6} <= broken_rules(plan)


@pytest.mark.parametrize("name", ["finite", "scale"])
def test_rule_5_an_update_that_ignores_what_was_checked(name: str) -> None:
    plan = checked_plan()
    index = find(plan, 0, Opcode.UPDATE)
    reads = tuple(b for b in plan.programs[0][index].reads if b != name)
    assert broken_rules(changed(plan, 0, index, reads=reads)) == {5}


DELAYED = PlanOptions(clip_norm=1.0, clip_delayed=True)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rules_5_and_6_a_delayed_clip(num_replicas: int) -> None:
    plan = chain_plan(2, 1, 2, num_replicas=num_replicas, options=DELAYED)
    assert broken_rules(plan) == set()
    clip, update = find(plan, 0, Opcode.CLIP), find(plan, 0, Opcode.UPDATE, -1)
    assert broken_rules(dropped(plan, 0, clip)) == {6}
    assert broken_rules(moved(plan, 0, clip, update)) == {5}
    (first, *_) = plan.programs[0][clip].reads
    assert broken_rules(changed(plan, 0, clip, reads=(first,))) == {5}
    blind = tuple(b for b in plan.programs[0][update].reads if b != "clip:scale")
    assert broken_rules(changed(plan, 0, update, reads=blind)) == {5}
    kept = tuple(b for b in plan.programs[0][update].writes if not b.startswith("square:"))
    assert 5 in broken_rules(changed(plan, 0, update, writes=kept))


def test_rule_5_an_update_before_the_checks() -> None:
    plan = checked_plan()
    early = moved(plan, 0, find(plan, 0, Opcode.UPDATE), find(plan, 0, Opcode.CLIP))
    assert 5 in broken_rules(early)


def test_rule_6_a_step_that_saves_nothing_or_too_early() -> None:
    plan = checked_plan()
    index = find(plan, 0, Opcode.SAVE)
    unsaved = dropped(plan, 0, index)
    assert broken_rules(unsaved) == {6}
    assert "at the end of the step host:shard:" in counterexample(unsaved, 6)
    assert broken_rules(repeated(plan, 0, index)) == set()
    early = moved(plan, 0, index, find(plan, 0, Opcode.UPDATE))
    assert {5} <= broken_rules(early)


def offloaded_plan() -> Plan:
    return chain_plan(2, 1, 2, offload_state=True)


def test_rule_5_a_missing_fetch() -> None:
    plan = offloaded_plan()
    for buffer in ("shard:stage.0", "moments:stage.0", "moments:stage.1"):
        index = find(plan, 0, Opcode.FETCH, writes=(buffer,))
        assert 5 in broken_rules(dropped(plan, 0, index))
        assert broken_rules(repeated(plan, 0, index)) == set()


def test_rule_6_a_missing_evict() -> None:
    """The host keeps the state from before the update: the next step would start from it."""
    plan = offloaded_plan()
    for kind in ("shard", "moments"):
        index = find(plan, 0, Opcode.EVICT, reads=(f"{kind}:stage.1",))
        lost = dropped(plan, 0, index)
        assert broken_rules(lost) == {6}
        assert f"host:{kind}:stage.1 of rank 0 holds the state before" in counterexample(lost, 6)


def test_rule_6_a_fetch_over_the_updated_state() -> None:
    """FETCH behind UPDATE brings the old state back, and EVICT then keeps it."""
    plan = offloaded_plan()
    fetch = find(plan, 0, Opcode.FETCH, -1, writes=("shard:stage.1",))
    program = list(plan.programs[0])
    program.insert(find(plan, 0, Opcode.UPDATE, unit="stage.1") + 1, program[fetch])
    assert broken_rules(with_program(plan, 0, program)) == {6}


def test_rule_5_a_released_buffer_is_read() -> None:
    plan = chain_plan(2, 1, 2, offload_inputs=True, recompute=True)
    release = find(plan, 0, Opcode.RELEASE, reads=("batch:x.0",))
    forward = find(plan, 0, Opcode.FORWARD, stage=0, micro_batch=0)
    assert 5 in broken_rules(moved(plan, 0, release, forward))
    fetch = find(plan, 0, Opcode.FETCH, writes=("batch:x.0",))
    assert 5 in broken_rules(dropped(plan, 0, fetch))
    # The copy alone takes nothing away.
    evict = find(plan, 0, Opcode.EVICT, reads=("batch:x.0",))
    assert broken_rules(moved(plan, 0, evict, forward)) == set()


def test_rule_5_a_release_beside_a_send() -> None:
    """A RELEASE waits for the SEND before it, and leaves nothing for one behind it."""
    plan = chain_plan(2, 2, 1, recompute=True)
    send = find(plan, 0, Opcode.SEND)
    release = Instruction(
        opcode=Opcode.RELEASE, stream="compute", micro_batch=0,
        reads=("h_0.0",), writes=("h_0.0",),
    )  # fmt: skip
    program = list(plan.programs[0])
    program.insert(send + 1, release)
    assert broken_rules(with_program(plan, 0, program)) == set()
    program[send : send + 2] = reversed(program[send : send + 2])
    assert 5 in broken_rules(with_program(plan, 0, program))


@pytest.mark.parametrize(
    ("opcode", "fields"),
    [
        (Opcode.FETCH, {"reads": ("host:moments:stage.0",)}),
        (Opcode.FETCH, {"unit": "stage.1"}),
        (Opcode.EVICT, {"unit": "stage.0"}),
        (Opcode.EVICT, {"writes": ()}),
        (Opcode.EVICT, {"reads": ("weights:float32.0",), "writes": ("host:shard:stage.1",)}),
        (Opcode.RELEASE, {"reads": ("shard:stage.1",), "writes": ("moments:stage.1",)}),
        (Opcode.RELEASE, {"reads": ("sum:float32.0",), "writes": ("sum:float32.0",)}),
        (Opcode.RELEASE, {"reads": (), "writes": ()}),
    ],
)
def test_rule_5_copies_of_something_else(opcode: Opcode, fields: dict[str, object]) -> None:
    plan = offloaded_plan()
    assert 5 in broken_rules(changed(plan, 0, find(plan, 0, opcode), **fields))


def test_rule_10_tied_gradients_that_are_not_added() -> None:
    """What others do silently: each rank updates its copy with its own gradient."""
    plan = chain_plan(tied=((0, 3),))
    for rank in (0, 1):
        index = find(plan, rank, Opcode.UPDATE, unit="tied.0")
        state = ("shard:tied.0", "moments:tied.0", "weights:tied.0")
        plan = changed(plan, rank, index, reads=("sum:tied.0.0", *state))
        plan = dropped(plan, rank, find(plan, rank, Opcode.REDUCE_TIED))
    assert {5, 10} <= broken_rules(plan)


def test_rule_10_tied_gradients_added_too_early_or_twice() -> None:
    plan = chain_plan(4, 2, 2, num_replicas=2, tied=((0, 3),))
    one, other = find(plan, 0, Opcode.REDUCE, unit="tied.0"), find(plan, 0, Opcode.REDUCE_TIED)
    assert {5, 10} <= broken_rules(swapped(plan, 0, one, other))
    for rank in (0, 1):
        plan = repeated(plan, rank, find(plan, rank, Opcode.REDUCE_TIED))
    assert {6, 10} <= broken_rules(plan)
    assert "added 2 times" in counterexample(plan, 6)


def test_rule_10_a_rank_that_uses_a_tied_unit_without_holding_it() -> None:
    plan = chain_plan(tied=((0, 3),))
    units = tuple(replace(u, ranks=(0,)) if u.name == "tied.0" else u for u in plan.units)
    assert 10 in broken_rules(replace(plan, units=units))


def test_rule_5_parts_of_a_tied_unit_in_the_wrong_order() -> None:
    """On one rank a tied gradient is summed per micro-batch first, as plain accumulation does."""
    plan = chain_plan(4, 1, 2, tied=((0, 3),))
    index = find(plan, 0, Opcode.BACKWARD, stage=0)
    reads = tuple(b for b in plan.programs[0][index].reads if not b.startswith("part:"))
    assert 5 in broken_rules(changed(plan, 0, index, reads=reads))


def host_plan(num_replicas: int = 1, **options: object) -> Plan:
    return chain_plan(
        3, 1, 2, offload_state=True, num_replicas=num_replicas, partition=3,
        options=PlanOptions(update_on_host=True, **options),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rules_5_and_6_an_update_on_the_host_without_its_gradient(num_replicas: int) -> None:
    plan = host_plan(num_replicas)
    assert broken_rules(plan) == set()
    evict = find(plan, 0, Opcode.EVICT, unit="stage.1")
    lost = dropped(plan, 0, evict)
    assert {5, 6} <= broken_rules(lost)
    assert "UPDATE of unit stage.1 finds no gradient" in counterexample(lost, 6)
    update = find(plan, 0, Opcode.UPDATE, unit="stage.1")
    assert {5, 6} <= broken_rules(moved(plan, 0, update, evict))
    blind = tuple(b for b in plan.programs[0][update].reads if not b.startswith("host:reduced:"))
    assert 5 in broken_rules(changed(plan, 0, update, reads=blind))
    assert 5 in broken_rules(changed(plan, 0, update, writes=("host:shard:stage.1",)))
    assert 6 in broken_rules(dropped(plan, 0, update))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rule_6_a_gradient_that_leaves_before_it_is_whole(num_replicas: int) -> None:
    plan = host_plan(num_replicas)
    evict = find(plan, 0, Opcode.EVICT, unit="stage.1")
    last = find(plan, 0, Opcode.BACKWARD, stage=1, micro_batch=1)
    before = last if num_replicas == 1 else find(plan, 0, Opcode.REDUCE, unit="stage.1")
    assert 6 in broken_rules(moved(plan, 0, evict, before))


def test_rule_6_a_gradient_that_leaves_for_another_unit() -> None:
    plan = host_plan()
    evict = find(plan, 0, Opcode.EVICT, unit="stage.1")
    wrong = changed(plan, 0, evict, unit="stage.0", writes=("host:reduced:stage.0",))
    assert 6 in broken_rules(wrong)


def test_rule_5_a_gradient_on_the_host_that_nothing_updates_with() -> None:
    plan = chain_plan(3, 1, 2, offload_state=True)
    evict = Instruction(
        opcode=Opcode.EVICT, stream="copy.out", unit="stage.1",
        reads=("sum:float32.0",), writes=("host:reduced:stage.1",),
    )  # fmt: skip
    program = list(plan.programs[0])
    program.insert(find(plan, 0, Opcode.UPDATE, unit="stage.1"), evict)
    plan = with_program(plan, 0, program)
    (entry,) = (b for b in plan.buffers[0] if b.name == "sum:float32.0")
    table = (*plan.buffers[0], replace(entry, name="host:reduced:stage.1"))
    assert 5 in broken_rules(replace(plan, buffers=(table,)))


def test_rule_5_a_sum_that_is_started_before_its_content_has_left() -> None:
    plan = host_plan()
    evict = find(plan, 0, Opcode.EVICT, unit="stage.2")
    (pool,) = plan.programs[0][evict].reads
    behind = find(plan, 0, Opcode.BACKWARD, stage=0, micro_batch=0)
    assert pool in plan.programs[0][behind].writes  # stage 0 has its turn in stage 2's buffer
    assert 5 in broken_rules(moved(plan, 0, evict, behind + 1))


def test_rule_5_an_update_on_the_host_that_ignores_a_verdict() -> None:
    plan = host_plan(check_finite=True, clip_norm=1.0)
    assert broken_rules(plan) == set()
    update = find(plan, 0, Opcode.UPDATE)
    for name in ("finite", "scale"):
        reads = tuple(b for b in plan.programs[0][update].reads if b != name)
        assert broken_rules(changed(plan, 0, update, reads=reads)) == {5}
    assert 5 in broken_rules(moved(plan, 0, update, find(plan, 0, Opcode.CLIP)))


def test_rule_5_a_gather_of_what_the_host_has_updated() -> None:
    """A FETCH behind the UPDATE brings weights of the next step."""
    plan = host_plan()
    fetch = find(plan, 0, Opcode.FETCH, -1, writes=("shard:stage.0",))
    update = find(plan, 0, Opcode.UPDATE, unit="stage.0")
    gather = replace(plan.programs[0][find(plan, 0, Opcode.GATHER, -1, unit="stage.0")])
    program = [*plan.programs[0], plan.programs[0][fetch], gather]
    assert fetch < update
    assert 5 in broken_rules(with_program(plan, 0, program))
