"""What a verdict shows: counterexamples, notes, the evaluation's programs, the command line."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from plan_changes import (
    broken_rules,
    changed,
    counterexample,
    dropped,
    find,
    limited,
    moved,
    swapped,
)
from synthetic import chain_plan

from planner.check import check
from planner.cli.check import main
from planner.plan.file import write_plan
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule


def on_evaluation(plan: Plan, changed_evaluation: Plan) -> Plan:
    """The plan with the programs of a changed `forward_only()` as its evaluation."""
    return replace(plan, evaluation=changed_evaluation.programs)


def test_the_evaluation_is_proved_too() -> None:
    plan = chain_plan(4, 2, 2, num_replicas=2, partition=3)
    evaluation = plan.forward_only()
    assert evaluation.programs != plan.programs
    report = check(evaluation)
    assert report.passed
    assert report.verdicts[1].note == "evaluation: no backward"
    forward = find(evaluation, 1, Opcode.FORWARD, stage=1)
    send = find(evaluation, 0, Opcode.SEND)
    load, gather = find(evaluation, 0, Opcode.LOAD), find(evaluation, 0, Opcode.GATHER)
    for rule, broken in (
        (2, dropped(evaluation, 1, forward)),
        (4, dropped(evaluation, 0, send)),
        (5, dropped(evaluation, 0, load)),
        (5, dropped(evaluation, 0, gather)),
    ):
        assert rule in broken_rules(broken)
        verdict = check(on_evaluation(plan, broken)).verdicts[rule - 1]
        assert verdict.counterexample.startswith("evaluation: ")
        assert "rank" in verdict.counterexample


def test_the_evaluation_may_not_train() -> None:
    plan = chain_plan(2, 1, 1)
    update = plan.programs[0][find(plan, 0, Opcode.UPDATE)]
    backward = plan.programs[0][find(plan, 0, Opcode.BACKWARD)]
    for instruction, rules in ((update, {5, 6}), (backward, {2, 5})):
        broken = replace(plan, evaluation=((*plan.evaluation[0], instruction),))
        assert rules <= broken_rules(broken)


def test_the_evaluation_gathers_once_per_stage() -> None:
    plan = chain_plan(2, 1, 1, num_replicas=2, partition=3)
    evaluation = plan.forward_only()
    gather = find(evaluation, 0, Opcode.GATHER)
    line = evaluation.programs[0][gather]
    broken = replace(plan, evaluation=((line, *plan.evaluation[0]),))
    assert broken_rules(broken) == {8}
    assert "2 GATHER" in counterexample(broken, 8)


def test_the_step_comes_before_the_evaluation() -> None:
    plan = chain_plan(2, 1, 1)
    load = find(plan, 0, Opcode.LOAD)
    both = replace(dropped(plan, 0, load), evaluation=(plan.evaluation[0][1:],))
    assert not counterexample(both, 5).startswith("evaluation")


def test_notes_say_what_is_not_claimed() -> None:
    plan = chain_plan(2, 2, 2, schedule=Schedule.ONE_F_ONE_B)
    notes = {verdict.number: verdict.note for verdict in check(plan).verdicts if verdict.note}
    assert notes == {
        3: "1f1b does not claim it, only forward passes and sums in ascending micro-batches",
        7: "the plan names no limit",
        8: "1f1b does not claim it",
    }
    assert not any(v.note for v in check(limited(chain_plan(), 10**9)).verdicts)


def test_the_counterexample_shows_the_programs_and_marks_the_cell() -> None:
    plan = chain_plan()
    send = find(plan, 0, Opcode.SEND, 1)
    message, head, *rows = counterexample(dropped(plan, 0, send), 4).splitlines()
    assert "sends h_2.0 where rank 1 expects h_0.1" in message
    assert head.split(" | ")[0].startswith("rank 1")
    assert sum(row.count(">>>") for row in rows) == 2
    assert any(">>> RECEIVE h_0.1 from 0 <<<" in row and ">>> SEND h_2.0" in row for row in rows)


def test_the_counterexample_shows_where_a_buffer_is_used() -> None:
    plan = chain_plan(1, 1, 2)
    load = find(plan, 0, Opcode.LOAD, micro_batch=1)
    late = moved(plan, 0, load, find(plan, 0, Opcode.BACKWARD))
    rows = counterexample(late, 5).splitlines()
    assert "reads batch:x.1, which holds nothing" in rows[0]
    marked = [row for row in rows if ">>>" in row]
    assert marked == ["    2 >>> F 0.1 <<<", "    3 >>> LOAD batch:x.1 <<<"]


def test_a_long_circle_over_many_ranks_is_shown() -> None:
    """The first rank sends only when its tensor has come back through all the others."""
    num_ranks = 20
    plan = chain_plan(2 * num_ranks, num_ranks, 1)
    send = find(plan, 0, Opcode.SEND, stage=1)
    plan = moved(plan, 0, send, find(plan, 0, Opcode.FORWARD, stage=num_ranks) + 1)
    assert broken_rules(plan) == {4}
    message, _, tables = counterexample(plan, 4).partition("\nrank ")
    assert "deadlock: 40 instructions wait for each other in a circle" in message
    assert "-> ... 16 more ..." in message
    # Four ranks side by side, up to sixteen; the marked ones of all stand in one row.
    blocks = tables.split("\n\n")
    assert blocks[-1] == "... and 4 more ranks"
    assert len(blocks) == 5
    for block in blocks[:-1]:
        assert max(row.count(">>>") for row in block.splitlines()) == 4


def test_a_circle_is_as_short_as_it_can_be() -> None:
    plan = chain_plan(4, 2, 3, tied=((0, 3), (1, 2)))
    calls = [i for i, x in enumerate(plan.programs[0]) if x.opcode is Opcode.REDUCE_TIED]
    shown = counterexample(swapped(plan, 0, *calls), 4)
    assert "deadlock: 2 instructions" in shown


def test_memory_names_the_moment() -> None:
    plan = chain_plan(2, 2, 3, saved_bytes=1000)
    shown = counterexample(limited(plan, 100), 7)
    assert "rank 0 can hold" in shown
    assert "more than the limit of 100" in shown
    assert "of activations" in shown
    assert ">>> " in shown


def test_failures_of_tables_say_where_to_look() -> None:
    plan = chain_plan(num_random_operators=1)
    for rule, broken in (
        (1, replace(plan, layer_names=(*plan.layer_names, "head"))),
        (6, replace(plan, units=(replace(plan.units[0], parameters=()), *plan.units[1:]))),
        (9, replace(plan, num_random_operators=9)),
        (10, replace(plan, units=(replace(plan.units[0], ranks=(0, 1)), *plan.units[1:]))),
    ):
        assert "look at the " in counterexample(broken, rule)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "chain.plan.yaml"


def test_the_command_proves_a_plan(written: Path) -> None:
    write_plan(
        chain_plan(2, 2, 2, schedule=Schedule.GPIPE, options=PlanOptions(save=True)), written
    )
    result = CliRunner().invoke(main, [str(written)])
    assert result.exit_code == 0, result.output
    assert result.output.count("holds") >= 10
    assert "gpipe does not claim it" in result.output


def test_the_command_shows_what_is_broken(written: Path) -> None:
    plan = chain_plan()
    index = find(plan, 0, Opcode.UPDATE)
    write_plan(dropped(plan, 0, index), written)
    result = CliRunner().invoke(main, [str(written)])
    assert result.exit_code == 1
    assert "BROKEN" in result.output
    assert "stage.2 is updated 0 times instead of 1 on rank 0" in result.output
    assert ">>>" in result.output


def test_the_command_shows_a_broken_evaluation(written: Path) -> None:
    plan = chain_plan()
    evaluation = plan.forward_only()
    receive = find(evaluation, 1, Opcode.RECEIVE)
    broken = changed(evaluation, 1, receive, micro_batch=1)
    write_plan(on_evaluation(plan, broken), written)
    result = CliRunner().invoke(main, [str(written)])
    assert result.exit_code == 1
    assert "evaluation: this RECEIVE is of micro-batch 1, but moves h_0.0" in result.output
