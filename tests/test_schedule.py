"""Schedule families: published figures, and what every order must keep to.

Expected makespans and peaks are those of the papers' formulas on unit costs, derived by hand.
"""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from synthetic import chain_placement, chain_plan

from planner.errors import UsageError
from planner.plan.types import Opcode
from planner.schedule import ComputeStep, Order, forward_order, order_of, require_complete
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve.types import Placement

ONE_STAGE = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)


def family(
    schedule: Schedule, loops: int, num_ranks: int = 4, num_micro_batches: int = 8, size: int = 8
) -> Placement:
    return chain_placement(
        loops * num_ranks, num_ranks, num_micro_batches, schedule=schedule, group_size=size
    )


def spelled(steps: tuple[ComputeStep, ...]) -> str:
    """`F0.1` for the forward of stage 0, micro-batch 1; R recomputes, I and W are half a B."""
    letters = {"FORWARD": "F", "RECOMPUTE": "R", "BACKWARD": "B"}
    letters |= {"BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return " ".join(f"{letters[s.opcode.value]}{s.stage}.{s.micro_batch}" for s in steps)


def finished(order: Order, num_stages: int) -> bool:
    """Whether ranks that follow the order, waiting for each other's results, come to its end."""
    done: set[tuple[str, int, int]] = set()
    positions = [0] * len(order.ranks)
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(order.ranks):
            while positions[rank] < len(steps):
                step = steps[positions[rank]]
                stage, m = step.stage, step.micro_batch
                if step.opcode is Opcode.FORWARD:
                    made, need = ("F", stage, m), ("F", stage - 1, m)
                elif stage == num_stages - 1:
                    made, need = ("B", stage, m), ("F", stage, m)
                else:
                    made, need = ("B", stage, m), ("B", stage + 1, m)
                if step.opcode in (Opcode.RECOMPUTE, Opcode.BACKWARD_WEIGHT):
                    made, need = (step.opcode.value, stage, m), ("F", stage, m)
                if need[1] >= 0 and need not in done:
                    break
                done.add(made)
                positions[rank] += 1
                moved = True
    return all(at == len(steps) for at, steps in zip(positions, order.ranks, strict=True))


@pytest.mark.parametrize(
    ("schedule", "loops", "makespan"),
    [
        (Schedule.GPIPE, 1, 132),
        (Schedule.ONE_F_ONE_B, 1, 132),
        (Schedule.INTERLEAVED, 2, 114),
        (Schedule.INTERLEAVED, 4, 105),
        (Schedule.HYBRID, 2, 114),
        (Schedule.HYBRID, 4, 105),
        (Schedule.LAYERED, 2, 114),
        (Schedule.LAYERED, 4, 105),
    ],
)
def test_makespans_of_sixteen_layers_on_four_ranks(
    schedule: Schedule, loops: int, makespan: int
) -> None:
    plan = chain_plan(4 * loops, 4, 8, layers_per_stage=4 // loops, schedule=schedule, group_size=8)
    assert simulate(plan).step_seconds == makespan


@pytest.mark.parametrize(
    ("schedule", "loops", "peaks"),
    [
        (Schedule.GPIPE, 1, [32, 32, 32, 32]),
        (Schedule.ONE_F_ONE_B, 1, [16, 12, 8, 4]),
        (Schedule.ZERO_BUBBLE, 1, [16, 16, 16, 16]),
        (Schedule.INTERLEAVED, 2, [22, 18, 14, 10]),
        (Schedule.INTERLEAVED, 4, [19, 17, 15, 13]),
        (Schedule.LAYERED, 2, [32, 32, 32, 32]),
        (Schedule.LAYERED, 4, [32, 32, 32, 32]),
        (Schedule.PLAIN, 4, [4, 4, 4, 4]),
    ],
)
def test_peak_of_stored_layer_inputs(schedule: Schedule, loops: int, peaks: list[int]) -> None:
    """Of 16 layers; stored from FORWARD to BACKWARD, or to BACKWARD_WEIGHT where it is split."""
    found = []
    for steps in order_of(family(schedule, loops)).ranks:
        stored = peak = 0
        for step in steps:
            change = {Opcode.FORWARD: 1, Opcode.BACKWARD: -1, Opcode.BACKWARD_WEIGHT: -1}
            stored += change.get(step.opcode, 0) * 4 // loops
            peak = max(peak, stored)
        found.append(peak)
    assert found == peaks


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 6])
@pytest.mark.parametrize("num_micro_batches", [6, 7, 12])
def test_zero_bubble_leaves_a_third_of_the_bubble(num_ranks: int, num_micro_batches: int) -> None:
    """Forward and both halves of backward take one second: 3 M of work on every rank."""
    size = (num_ranks, num_ranks, num_micro_batches)
    split = simulate(chain_plan(*size, schedule=Schedule.ZERO_BUBBLE)).step_seconds
    whole = simulate(chain_plan(*size, schedule=Schedule.ONE_F_ONE_B)).step_seconds
    assert split == 3 * num_micro_batches + num_ranks - 1
    assert whole == 3 * num_micro_batches + 3 * (num_ranks - 1)


def test_orders_of_two_ranks_in_full() -> None:
    def ranks(schedule: Schedule, loops: int = 1, **changes: object) -> list[str]:
        placement = family(schedule, loops, num_ranks=2, num_micro_batches=2, size=2)
        return [spelled(s) for s in order_of(replace(placement, **changes)).ranks]  # type: ignore[arg-type]

    assert ranks(Schedule.GPIPE) == ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1"]
    assert ranks(Schedule.ONE_F_ONE_B, recompute=(False, True)) == [
        "F0.0 F0.1 B0.0 B0.1", "F1.0 R1.0 B1.0 F1.1 R1.1 B1.1"
    ]  # fmt: skip
    assert ranks(Schedule.ZERO_BUBBLE, recompute=(True, False)) == [
        "F0.0 F0.1 R0.0 I0.0 W0.0 R0.1 I0.1 W0.1", "F1.0 I1.0 F1.1 I1.1 W1.0 W1.1"
    ]  # fmt: skip
    assert ranks(Schedule.INTERLEAVED, 2) == [
        "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1", "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"
    ]  # fmt: skip
    assert ranks(Schedule.LAYERED, 2)[1] == "F1.0 F1.1 F3.0 F3.1 B3.0 B3.1 B1.0 B1.1"
    assert ranks(Schedule.PLAIN, 2)[0] == "F0.0 F2.0 B2.0 B0.0 F0.1 F2.1 B2.1 B0.1"
    assert ranks(Schedule.FORWARD, 2)[0] == "F0.0 F0.1 F2.0 F2.1"


def test_groups_as_large_as_the_pipeline_are_depth_first() -> None:
    for loops in (1, 2, 3):
        hybrid = order_of(family(Schedule.HYBRID, loops, size=4))
        assert hybrid == order_of(family(Schedule.INTERLEAVED, loops))


@given(
    schedule=st.sampled_from([s for s in Schedule if s is not Schedule.CUSTOM]),
    num_ranks=st.integers(1, 5),
    loops=st.integers(1, 4),
    num_micro_batches=st.integers(1, 14),
    size=st.integers(1, 14),
    recompute=st.booleans(),
)
def test_every_order_is_whole_ascending_and_runs_to_its_end(
    schedule: Schedule,
    num_ranks: int,
    loops: int,
    num_micro_batches: int,
    size: int,
    recompute: bool,
) -> None:
    loops = 1 if schedule in ONE_STAGE else loops
    placement = family(schedule, loops, num_ranks, num_micro_batches, size)
    placement = replace(placement, recompute=(recompute,) * placement.num_stages)
    try:
        order = order_of(placement)
    except UsageError:
        assert schedule in (Schedule.INTERLEAVED, Schedule.HYBRID)
        assume(False)
    if schedule is not Schedule.FORWARD:
        require_complete(order, placement)
    assert finished(order, placement.num_stages)
    for steps in order.ranks:
        seen: Counter[tuple[Opcode, int]] = Counter()
        for before, step in zip((None, *steps), steps, strict=False):
            assert step.micro_batch == seen[step.opcode, step.stage]
            seen[step.opcode, step.stage] += 1
            if before and before.opcode is Opcode.RECOMPUTE:
                assert step.opcode in (Opcode.BACKWARD, Opcode.BACKWARD_INPUT)
                assert (step.stage, step.micro_batch) == (before.stage, before.micro_batch)


def test_evaluation_is_the_forward_half_of_the_layered_order() -> None:
    placement = family(Schedule.LAYERED, 2)
    whole = order_of(placement)
    for steps, forward in zip(whole.ranks, forward_order(placement).ranks, strict=True):
        assert steps[: len(forward)] == forward
        assert all(step.opcode is not Opcode.FORWARD for step in steps[len(forward) :])


@pytest.mark.parametrize("schedule", ONE_STAGE)
def test_several_stages_on_a_rank_are_refused(schedule: Schedule) -> None:
    with pytest.raises(UsageError, match=r"8 stages are on 4 ranks, 2 to 2 on each") as error:
        order_of(family(schedule, 2))
    assert "cut the model into 4 stages" in error.value.hint


@pytest.mark.parametrize("schedule", [Schedule.INTERLEAVED, Schedule.HYBRID])
def test_uneven_numbers_of_stages_are_refused(schedule: Schedule) -> None:
    placement = chain_placement(7, 4, 8, schedule=schedule, group_size=8)
    with pytest.raises(UsageError, match=r"7 stages are on 4 ranks, 1 to 2 on each"):
        order_of(placement)


def test_micro_batches_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of its 4 pipeline ranks, not 6") as error:
        order_of(family(Schedule.INTERLEAVED, 2, num_micro_batches=6))
    assert "take 8 micro-batches" in error.value.hint
    with pytest.raises(UsageError, match="6 micro-batches in groups of 5 leave a last group of 1"):
        order_of(family(Schedule.HYBRID, 2, num_micro_batches=6, size=5))
    with pytest.raises(UsageError, match=r"groups of 3 .* takes from 4 .* to 6"):
        order_of(family(Schedule.HYBRID, 2, num_micro_batches=6, size=3))
    with pytest.raises(UsageError, match="groups of 4") as error:
        order_of(family(Schedule.HYBRID, 2, num_micro_batches=3, size=4))
    assert "at least as many micro-batches as pipeline ranks" in error.value.hint


def test_no_rule_makes_a_custom_order() -> None:
    with pytest.raises(UsageError, match="custom") as error:
        order_of(family(Schedule.CUSTOM, 1))
    assert "zb-h1" in error.value.hint


def test_orders_that_are_not_a_whole_step_are_refused() -> None:
    placement = chain_placement(2, 2, 2)
    order = order_of(placement)
    require_complete(order, placement)
    first, second = order.ranks
    for ranks, what in [
        ((first[:-1], second), "stage 0, micro-batch 1 has FORWARD\n"),
        (((*first, first[-1]), second), "BACKWARD of stage 0, micro-batch 1 stands twice"),
        ((second, first), "stage 1, micro-batch 0 is on rank 0, its stage elsewhere"),
        (((*first, replace(first[0], micro_batch=2)), second), "micro-batch 2, is unknown"),
        (((*first, replace(first[0], stage=2)), second), "stage 2, micro-batch 0, is unknown"),
        ((first,), "1 ranks instead of 2"),
    ]:
        with pytest.raises(UsageError, match=what):
            require_complete(Order(ranks=ranks), placement)
    again = replace(placement, recompute=(True, False))
    with pytest.raises(UsageError, match="stage 0, micro-batch 0 has BACKWARD, FORWARD"):
        require_complete(order, again)
