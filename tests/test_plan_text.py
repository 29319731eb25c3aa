"""Whatever a plan can hold survives its text: names, instructions, statements, every schedule."""

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import chain_plan

from planner.plan.code import Reference, Statement, Symbol, parse_statement
from planner.plan.file import parse_plan, print_plan
from planner.plan.text import parse_program, print_program
from planner.plan.types import Instruction, Opcode, PlanOptions
from planner.schedules import Schedule

NAMES = (
    "", " ", "%", "%41", "a%", "->", ":", "a -> b", "stage 3", "a\u2028b", "a\x85b", "\x1c",
    "\ufeff", "\n", "a\nb\n", "a\n\n", "\r\n", "null", "~", "yes", "017", "1.0e30", "2001-01-01",
    "&a", "*a", "!t", "- a", "? a", "a: b", "#", "  # random 1 2", "'\"", "\\", "漢🙂", "é" * 300,
    "{", "a,b", "|", "<<", "---",
)  # fmt: skip
names = st.sampled_from(NAMES) | st.text(st.characters(codec="utf-8"), max_size=12)
buffers = st.lists(names, max_size=3).map(tuple)
instructions = st.builds(
    Instruction,
    opcode=st.sampled_from(list(Opcode)),
    stream=names,
    stage=st.none() | st.integers(0, 10**6),
    micro_batch=st.none() | st.integers(0, 10**6),
    unit=st.none() | names,
    peer=st.none() | st.integers(0, 10**6),
    reads=buffers,
    writes=buffers,
)


@given(st.lists(instructions, max_size=4).map(tuple))
def test_any_program_survives(program: tuple[Instruction, ...]) -> None:
    assert parse_program(print_program(program)) == program


constants = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | names
    | st.builds(Reference, st.sampled_from(["x", "t_1"])) | st.just(Symbol("torch.float32")),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(names | st.integers(0, 9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
statements = st.builds(
    Statement,
    target=st.just("t"),
    function=st.sampled_from(["layer", "getitem", "aten.add.Tensor"]),
    arguments=st.lists(constants, max_size=3).map(tuple),
    keywords=st.lists(st.tuples(st.sampled_from("ab"), constants), max_size=1).map(tuple),
    num_random_operators=st.integers(0, 3),
)


@given(statements, names)
def test_any_statement_survives(statement: Statement, path: str) -> None:
    statement = replace(statement, path=path if statement.function == "layer" else "")
    assert parse_statement(str(statement)) == statement


SCHEDULES = [
    *((schedule, 4, 2) for schedule in (Schedule.LAYERED, Schedule.INTERLEAVED, Schedule.FORWARD)),
    *((schedule, 2, 2) for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B)),
    (Schedule.ZERO_BUBBLE, 2, 2),
    (Schedule.LAYERED, 1, 1),
]
EVERYTHING = PlanOptions(check_finite=True, clip_norm=0.5, save=True, seed=3)
DELAYED = PlanOptions(clip_norm=0.5, clip_delayed=True)


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("offload_state", [False, True])
@pytest.mark.parametrize(("schedule", "num_stages", "num_ranks"), SCHEDULES)
def test_plans_of_every_schedule_survive(
    schedule: Schedule, num_stages: int, num_ranks: int, offload_state: bool, partition: int
) -> None:
    plan = chain_plan(
        num_stages, num_ranks, 4, num_replicas=2, schedule=schedule, partition=partition,
        offload_state=offload_state, options=EVERYTHING,
    )  # fmt: skip
    assert parse_plan(print_plan(plan)) == plan
    delayed = chain_plan(num_stages, num_ranks, 4, schedule=schedule, options=DELAYED)
    assert parse_plan(print_plan(delayed)) == delayed


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The value with parts of its texts replaced wherever they stand; of code only batch keys."""
    match value:
        case Statement(function="batch"):
            return replace(value, arguments=renamed(value.arguments, names))
        case Schedule() | Opcode() | Statement() | None | bool() | int() | float():
            return value
        case str():
            pattern = r"^x$|(?<=^batch:)x(?=\.|$)|layer|stage|made-up"
            return re.sub(pattern, lambda found: names[found[0]], value)
        case tuple():
            return tuple(renamed(item, names) for item in value)
        case dict():
            return {renamed(key, names): renamed(item, names) for key, item in value.items()}
    fields = {f.name: renamed(getattr(value, f.name), names) for f in dataclasses.fields(value)}
    return type(value)(**fields)


@settings(max_examples=100, deadline=None)
@given(names, names, names, names)
def test_odd_names_survive(key: str, layer: str, unit: str, free: str) -> None:
    """Users name batch keys, layers and parameters; other texts come from their cluster files."""
    plan = chain_plan(3, 2, 2, num_replicas=2, partition=3, options=EVERYTHING)
    odd = renamed(plan, {"x": key, "layer": layer, "stage": unit, "made-up": free})
    odd = replace(odd, model_name=free, fingerprint=layer)
    assert f"batch:{key}.0" in {name for i in odd.programs[0] for name in i.writes}
    assert parse_plan(print_plan(odd)) == odd


def test_one_instruction_is_one_readable_line() -> None:
    instruction = Instruction(
        opcode=Opcode.FORWARD,
        stream="compute",
        stage=3,
        micro_batch=1,
        reads=("h_2.1", "weights:float32.0"),
        writes=("h_3.1", "saved:3.1"),
    )
    assert print_program((instruction,)) == (
        "compute  FORWARD      stage 3 micro_batch 1 : h_2.1 weights:float32.0 -> h_3.1 saved:3.1\n"
    )
