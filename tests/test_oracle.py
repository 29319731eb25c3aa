"""The oracle itself: good plans pass, broken ones show the right fault, peaks are as by hand."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from mutations import mutate
from oracle import judge
from small_plans import small_plan
from synthetic import chain_plan

from planner.plan.types import Instruction, Opcode, Plan, PlanOptions, Prediction
from planner.schedules import Schedule

Line = Callable[[Instruction], bool]

ALL_OPTIONS = PlanOptions(check_finite=True, clip_norm=1.0, save=True)
GOOD: dict[str, Callable[[], Plan]] = {
    "one of everything": lambda: chain_plan(1, 1, 1),
    "plain": lambda: chain_plan(4, 2, 2),
    "three ranks": lambda: chain_plan(5, 3, 2, skips=((0, 3),)),
    "recompute": lambda: chain_plan(4, 2, 2, recompute=True),
    "partitioned": lambda: chain_plan(4, 2, 2, num_replicas=2, partition=3),
    "optimizer partitioned": lambda: chain_plan(4, 2, 2, num_replicas=2, partition=1),
    "gradients partitioned": lambda: chain_plan(
        3, 2, 2, num_replicas=2, partition=2, options=ALL_OPTIONS, offload_state=True
    ),
    "mixed precision": lambda: chain_plan(
        4, 2, 2, tied=((0, 2), (1, 2)), num_elements=3, compute_dtype="bfloat16"
    ),
    "mixed precision, weights partitioned": lambda: chain_plan(
        4, 2, 2, num_replicas=2, partition=3, num_elements=3, compute_dtype="float16"
    ),
    "mixed precision, optimizer partitioned": lambda: chain_plan(
        4, 2, 2, num_replicas=2, partition=1, compute_dtype="bfloat16"
    ),
    "mixed precision, offloaded": lambda: chain_plan(
        2, 2, 2, offload_state=True, compute_dtype="bfloat16"
    ),
    "tied and skips": lambda: chain_plan(4, 2, 2, tied=((0, 3),), skips=((0, 2), (0, 3))),
    "tied on one rank": lambda: chain_plan(4, 2, 2, tied=((0, 2),)),
    "options": lambda: chain_plan(4, 2, 2, options=ALL_OPTIONS),
    "offloaded state": lambda: chain_plan(2, 2, 2, offload_state=True),
    "updates on the host": lambda: chain_plan(
        3, 1, 2, offload_state=True, options=PlanOptions(update_on_host=True)
    ),
    "updates on the host, replicas": lambda: chain_plan(
        3,
        1,
        2,
        offload_state=True,
        num_replicas=2,
        partition=3,
        options=PlanOptions(update_on_host=True, clip_norm=1.0, clip_delayed=True),
    ),
    "updates on the host that wait, tied": lambda: chain_plan(
        4,
        2,
        1,
        offload_state=True,
        tied=((0, 3),),
        compute_dtype="bfloat16",
        options=PlanOptions(update_on_host=True, check_finite=True, clip_norm=1.0, save=True),
    ),
    "offloaded inputs": lambda: chain_plan(4, 2, 2, offload_inputs=True),
    "1F1B": lambda: chain_plan(2, 2, 3, schedule=Schedule.ONE_F_ONE_B),
    "zero bubble": lambda: chain_plan(2, 2, 3, schedule=Schedule.ZERO_BUBBLE),
    "interleaved": lambda: chain_plan(4, 2, 2, schedule=Schedule.INTERLEAVED, num_replicas=2),
    "accumulation": lambda: chain_plan(
        3, 1, 2, schedule=Schedule.PLAIN, num_replicas=2, partition=3, num_gradient_buffers=1
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_plans_have_no_fault(name: str) -> None:
    plan = GOOD[name]()
    result = judge(plan)
    assert result.faults == ()
    assert result.complete
    assert all(peak > 0 for peak in result.peak_bytes)


def is_(opcode: Opcode, **fields: object) -> Line:
    """Whether an instruction has this opcode and these fields."""
    return lambda line: (
        line.opcode is opcode
        and all(getattr(line, name) == value for name, value in fields.items())
    )


def edited(plan: Plan, rank: int, edit: Callable[[list[Instruction]], object]) -> Plan:
    lines = list(plan.programs[rank])
    edit(lines)
    programs = (*plan.programs[:rank], tuple(lines), *plan.programs[rank + 1 :])
    return replace(plan, programs=programs)


def place(lines: list[Instruction], wanted: Line) -> int:
    return next(index for index, line in enumerate(lines) if wanted(line))


def dropped(plan: Plan, rank: int, wanted: Line) -> Plan:
    return edited(plan, rank, lambda lines: lines.pop(place(lines, wanted)))


def doubled(plan: Plan, rank: int, wanted: Line) -> Plan:
    def double(lines: list[Instruction]) -> None:
        lines.insert(place(lines, wanted), lines[place(lines, wanted)])

    return edited(plan, rank, double)


def behind(plan: Plan, rank: int, moved: Line, anchor: Line) -> Plan:
    """The first `moved` line stands right behind the first `anchor` line."""

    def move(lines: list[Instruction]) -> None:
        line = lines.pop(place(lines, moved))
        lines.insert(place(lines, anchor) + 1, line)

    return edited(plan, rank, move)


def changed(plan: Plan, rank: int, wanted: Line, **fields: object) -> Plan:
    def change(lines: list[Instruction]) -> None:
        index = place(lines, wanted)
        lines[index] = replace(lines[index], **fields)  # type: ignore[arg-type]

    return edited(plan, rank, change)


def resized(plan: Plan, rank: int, name: str, **fields: object) -> Plan:
    table = tuple(
        replace(buffer, **fields) if buffer.name == name else buffer  # type: ignore[arg-type]
        for buffer in plan.buffers[rank]
    )
    return replace(plan, buffers=(*plan.buffers[:rank], table, *plan.buffers[rank + 1 :]))


def swapped_collectives(plan: Plan) -> Plan:
    def swap(lines: list[Instruction]) -> None:
        one = place(lines, is_(Opcode.REDUCE_TIED, unit="tied.0"))
        other = place(lines, is_(Opcode.REDUCE_TIED, unit="tied.1"))
        lines[one], lines[other] = lines[other], lines[one]

    return edited(plan, 0, swap)


FORWARD, BACKWARD, UPDATE = Opcode.FORWARD, Opcode.BACKWARD, Opcode.UPDATE
SEND, RECEIVE, LOAD, GATHER = Opcode.SEND, Opcode.RECEIVE, Opcode.LOAD, Opcode.GATHER
BROKEN: dict[str, tuple[str, Callable[[], Plan]]] = {
    "a send without a receive": ("hang", lambda: _one_send_more(chain_plan(2, 2, 1))),
    "a send behind the compute that needs its answer": (
        "hang",
        lambda: behind(chain_plan(2, 2, 1), 0, is_(SEND), is_(BACKWARD)),
    ),
    "not received": ("race", lambda: dropped(chain_plan(2, 2, 1), 1, is_(RECEIVE))),
    "collectives in another order on one rank": (
        "hang",
        lambda: swapped_collectives(chain_plan(4, 2, 1, tied=((0, 3), (0, 1)))),
    ),
    "not loaded": ("race", lambda: dropped(chain_plan(), 0, is_(LOAD))),
    "loaded too late": ("race", lambda: behind(chain_plan(), 0, is_(LOAD), is_(FORWARD))),
    "released too early": (
        "race",
        lambda: edited(
            chain_plan(2, 1, 1, num_replicas=2, partition=3),
            0,
            lambda lines: lines.insert(
                place(lines, is_(FORWARD)), lines.pop(place(lines, is_(Opcode.RELEASE)))
            ),
        ),
    ),
    "evicted and not fetched": (
        "race",
        lambda: dropped(
            chain_plan(2, 1, 1, num_replicas=2, offload_state=True), 0, is_(Opcode.FETCH)
        ),
    ),
    "kinds of operand": ("signature", lambda: changed(chain_plan(), 0, is_(FORWARD), reads=())),
    "computed with masters": (
        "shape",
        lambda: resized(
            chain_plan(compute_dtype="bfloat16"), 0, "weights:stage.0", dtype="float32"
        ),
    ),
    "summed in half": (
        "shape",
        lambda: resized(
            chain_plan(compute_dtype="bfloat16"),
            0,
            "sum:float32.bfloat16.0",
            dtype="bfloat16",
        ),
    ),
    "another peer's stage": ("signature", lambda: changed(chain_plan(), 0, is_(SEND), stage=0)),
    "sent in another order": (
        "transfer",
        lambda: behind(chain_plan(), 0, is_(SEND, micro_batch=0), is_(SEND, micro_batch=1)),
    ),
    "micro-batches in another order": ("order", lambda: _last_micro_batch_first()),
    "backward in another order of stages": (
        "order",
        lambda: replace(chain_plan(2, 1, 2, schedule=Schedule.PLAIN), schedule=Schedule.LAYERED),
    ),
    "a sum that loses a micro-batch": (
        "gradient",
        lambda: dropped(chain_plan(1, 1, 2), 0, is_(BACKWARD, micro_batch=1)),
    ),
    "a sum that is started twice": ("gradient", lambda: _started_twice()),
    "computed twice": ("count", lambda: doubled(chain_plan(), 0, is_(FORWARD))),
    "gathered per micro-batch": (
        "count",
        lambda: doubled(
            doubled(chain_plan(1, 1, 1, num_replicas=2, partition=3), 0, is_(GATHER)),
            0,
            is_(GATHER),
        ),
    ),
    "updated parts that are not gathered": (
        "end",
        lambda: dropped(chain_plan(num_replicas=2, partition=1), 0, is_(GATHER)),
    ),
    "updated parts that are gathered twice": (
        "count",
        lambda: doubled(chain_plan(num_replicas=2, partition=2), 0, is_(GATHER)),
    ),
    "parts gathered before their update": (
        "race",
        lambda: behind(chain_plan(num_replicas=2, partition=2), 0, is_(GATHER), is_(BACKWARD)),
    ),
    "an update without its verdict": (
        "count",
        lambda: dropped(chain_plan(options=ALL_OPTIONS), 0, is_(Opcode.CHECK_FINITE)),
    ),
    "not saved": ("end", lambda: dropped(chain_plan(options=ALL_OPTIONS), 0, is_(Opcode.SAVE))),
    "too small for its gradient": (
        "shape",
        lambda: resized(chain_plan(), 0, "sum:float32.0", shape=(0,)),
    ),
    "another type at the other end": (
        "shape",
        lambda: resized(chain_plan(), 1, "h_0", dtype="bfloat16"),
    ),
}


def _one_send_more(plan: Plan) -> Plan:
    return edited(plan, 0, lambda lines: lines.append(lines[place(lines, is_(SEND))]))


def _last_micro_batch_first() -> Plan:
    plan = chain_plan(1, 1, 2)

    def swap(lines: list[Instruction]) -> None:
        one = place(lines, is_(BACKWARD, micro_batch=0))
        other = place(lines, is_(BACKWARD, micro_batch=1))
        first, second = lines[one], lines[other]
        lines[one] = replace(second, reads=tuple(r for r in second.reads if r[:3] != "sum"))
        lines[other] = replace(first, reads=(*first.reads, *second.reads[-1:]))

    return edited(plan, 0, swap)


def _started_twice() -> Plan:
    plan = chain_plan(1, 1, 2)
    line = next(filter(is_(BACKWARD, micro_batch=1), plan.programs[0]))
    reads = tuple(name for name in line.reads if not name.startswith("sum:"))
    return changed(plan, 0, is_(BACKWARD, micro_batch=1), reads=reads)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plans_show_the_fault(name: str) -> None:
    kind, make = BROKEN[name]
    assert kind in judge(make()).kinds


def test_losing_any_pass_transfer_or_update_shows() -> None:
    plan = chain_plan(4, 2, 2, skips=((0, 2),))
    for rank, program in enumerate(plan.programs):
        for index, line in enumerate(program):
            if line.opcode in (SEND, RECEIVE, FORWARD, BACKWARD, UPDATE, LOAD):
                fewer = edited(plan, rank, lambda lines, index=index: lines.pop(index))  # type: ignore[misc]
                assert judge(fewer).faults, line


def test_the_reduced_search_finds_what_the_full_one_finds() -> None:
    """On plans and on mutants: the same faults or none, and where none, the same peak."""
    num_harmless = num_states = 0
    for seed in range(60):
        chooser = random.Random(seed)
        plan = small_plan(chooser, max_instructions=24)
        if seed % 3:
            _, plan = mutate(plan, chooser)
        reduced, full = judge(plan), judge(plan, reduce=False, max_states=100_000)
        assert full.complete
        assert reduced.kinds == full.kinds
        if not full.faults:
            num_harmless += 1
            assert reduced.peak_bytes == full.peak_bytes
            assert reduced.num_states <= full.num_states
            num_states += full.num_states - reduced.num_states
    assert num_harmless > 15
    assert num_states > 500


def test_peak_of_one_stage_by_hand() -> None:
    plan = chain_plan(1, 1, 1, num_elements=3, saved_bytes=12, transient_bytes=40)
    weights, moments, total = 12, 24, 12
    # Forward: the key of the batch, what is saved, and the rest of the 40 bytes that it takes.
    forward = 4 + 12 + (40 - 12)
    backward = 12 + 40
    assert judge(plan).peak_bytes == (weights + moments + total + max(forward, backward),)


def test_peak_counts_a_send_whose_receiver_is_late() -> None:
    """While rank 1 has not received anything, rank 0 may hold both outputs and await a gradient."""
    plan = chain_plan(2, 2, 2, width=100)
    wanted = [
        *(is_(opcode, micro_batch=m) for m in (0, 1) for opcode in (LOAD, FORWARD, SEND)),
        *(is_(opcode, micro_batch=m) for m in (0, 1) for opcode in (RECEIVE, BACKWARD)),
        is_(UPDATE),
    ]
    program = plan.programs[0]
    assert len(program) == len(wanted)
    lines = tuple(next(filter(line, program)) for line in wanted)
    result = judge(replace(plan, programs=(lines, plan.programs[1])))
    weights, moments, total = 4, 8, 4
    assert result.faults == ()
    assert result.peak_bytes[0] == weights + moments + total + 2 * 400 + 400


def test_memory_above_the_limit_is_a_fault() -> None:
    plan = chain_plan(2, 2, 2)
    peak = max(judge(plan).peak_bytes)
    for limit, kinds in ((peak, set()), (peak - 1, {"memory"})):
        prediction = Prediction(
            step_seconds=1.0,
            bubble=0.0,
            peak_bytes=(0, 0),
            memory_limit_bytes=limit,
            provenance="test",
        )
        assert judge(replace(plan, prediction=prediction)).kinds == kinds


def test_evaluation_is_judged_as_a_plan_of_its_own() -> None:
    plan = chain_plan()
    assert plan.evaluation
    evaluation = tuple(program[1:] for program in plan.evaluation)
    assert judge(replace(plan, evaluation=evaluation)).faults


def test_beyond_its_limit_the_oracle_walks_at_random() -> None:
    plan = chain_plan(4, 2, 2)
    result = judge(replace(plan, evaluation=()), max_states=10)
    assert not result.complete
    assert result.faults == ()
    assert result.num_states == 10
    hanging = _one_send_more(plan)
    assert judge(hanging, max_states=10).kinds == {"hang"}
