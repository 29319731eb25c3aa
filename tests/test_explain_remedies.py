"""What would make an infeasible problem feasible: each remedy is true, and the smallest first."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from explain_problems import QUICK, chain_problem, planner

from planner.errors import InfeasibleError
from planner.explain.demands import meets
from planner.explain.fit import first_fit
from planner.explain.remedies import Remedy, find_remedies, with_remedies
from planner.explain.types import limits_of, simulator
from planner.schedules import Schedule
from planner.solve import Problem, solve


def is_feasible(problem: Problem) -> bool:
    try:
        solve(problem, simulator(planner()(problem)))
    except InfeasibleError:
        return False
    return True


def remedies_of(problem: Problem) -> tuple[Remedy, ...]:
    assert not is_feasible(problem)
    return find_remedies(problem, planner(), time_limit_seconds=60.0)


TIGHT: dict[str, Any] = {"num_layers": 6, "num_devices": 2, "batch": 8, "time_limit_seconds": 10.0}


PINNED: dict[str, Any] = {"num_pipeline_ranks": 2, "micro_batch_size": 1, **QUICK}


@pytest.mark.parametrize(
    ("wanted", "num_elements", "memory_bytes", "words"),
    [
        ({"recompute": False, **PINNED}, 150_000, 16 * 10**6, "recompute the activations"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"recompute": False}, 150_000, 16 * 10**6, "recompute the activations"),
                (
                    {"micro_batch_size": 8, "recompute": True},
                    150_000, 12 * 10**6, "micro-batches of",
                ),
                (
                    {"partition": 0, "num_replicas": 2, "offload_state": False},
                    600_000, 40 * 10**6, "partition level",
                ),
                (
                    {"num_pipeline_ranks": 1, "partition": 0, "offload_state": False},
                    600_000, 40 * 10**6, "pipeline ranks",
                ),
            )
        ),
    ],
)  # fmt: skip
def test_remedies_are_true(
    wanted: dict[str, Any], num_elements: int, memory_bytes: int, words: str
) -> None:
    problem = chain_problem(memory_bytes=memory_bytes, num_elements=num_elements, **TIGHT, **wanted)
    found = remedies_of(problem)
    assert any(words in remedy.words for remedy in found), [remedy.words for remedy in found]
    for remedy in found:
        simulated = simulator(planner()(remedy.problem))(remedy.placement)
        limits = limits_of(remedy.problem, remedy.placement)
        assert all(p <= limit for p, limit in zip(simulated.peak_bytes, limits, strict=True))
        assert simulated.step_seconds == remedy.step_seconds
        is_asked_for = meets(problem.constraints, remedy.placement)
        is_same = remedy.placement.global_batch_size == problem.global_batch_size
        if remedy.words.startswith("a longer --time-limit"):
            assert is_asked_for
            assert remedy.problem == problem
            continue
        if is_asked_for and is_same and remedy.placement.world_size <= problem.num_devices:
            own = simulator(planner()(problem))(remedy.placement)
            assert not own.fits(limits_of(problem, remedy.placement))
        differs = [
            field.name
            for field in dataclasses.fields(Problem)
            if field.name != "time_limit_seconds"
            and getattr(remedy.problem, field.name) != getattr(problem, field.name)
        ]
        assert differs in (
            ["constraints"], ["memory_limit_bytes"], ["cluster", "num_devices"],
            ["num_devices"], ["global_batch_size"],
        )  # fmt: skip
    assert [remedy.size for remedy in found] == sorted(remedy.size for remedy in found)


def test_the_memory_named_is_the_smallest() -> None:
    problem = chain_problem(memory_bytes=3 * 10**6, num_elements=150_000, **TIGHT, **PINNED)
    found = [r for r in remedies_of(problem) if "of usable memory each" in r.words]
    assert len(found) == 1
    enough = found[0].problem.memory_limit_bytes
    assert enough is not None
    assert is_feasible(dataclasses.replace(problem, memory_limit_bytes=enough))
    assert not is_feasible(dataclasses.replace(problem, memory_limit_bytes=round(0.9 * enough)))
    assert found[0].size == pytest.approx(enough / (3 * 10**6) - 1)


def test_what_is_left_free_counts_as_room() -> None:
    """Offload and single buffers are choices like any other."""
    wanted = {**PINNED, "num_pipeline_ranks": 1, "num_replicas": 1, "stages_per_rank": 12}
    pinned = ("offload_state", "offload_inputs", "num_buffers")
    free = {name: value for name, value in wanted.items() if name not in pinned}
    sizes = {"memory_bytes": 2 * 10**6, "num_elements": 150_000, **TIGHT, "num_layers": 12}
    needed = [
        memory_remedy(
            find_remedies(chain_problem(**{**sizes, **demands}), planner(), time_limit_seconds=3.0)
        )
        for demands in (wanted, free)
    ]
    assert needed[1] < 0.7 * needed[0]
    problem = chain_problem(**{**sizes, **free, "memory_bytes": needed[1]})
    placement = first_fit(problem, simulator(planner()(problem)), time_limit_seconds=10.0)
    assert placement is not None
    assert placement.offload_state


def memory_remedy(found: Sequence[Remedy]) -> int:
    """Bytes of the one that names memory."""
    (remedy,) = [remedy for remedy in found if remedy.problem.memory_limit_bytes is not None]
    assert remedy.problem.memory_limit_bytes is not None
    return remedy.problem.memory_limit_bytes


def test_more_devices_are_named() -> None:
    pinned = {name: value for name, value in PINNED.items() if name != "num_pipeline_ranks"}
    problem = chain_problem(memory_bytes=25 * 10**6, num_elements=600_000, **TIGHT, **pinned)
    found = [r for r in remedies_of(problem) if "devices (" in r.words]
    assert len(found) == 1
    assert found[0].problem.num_devices == found[0].placement.world_size > 2
    assert found[0].size == found[0].problem.num_devices / 2 - 1


@pytest.mark.slow
def test_the_error_keeps_its_reason_and_gets_the_remedies() -> None:
    problem = chain_problem(memory_bytes=3 * 10**6, num_elements=150_000, **TIGHT)
    with pytest.raises(InfeasibleError, match="on pipeline rank") as caught:
        solve(problem, simulator(planner()(problem)))
    error = with_remedies(caught.value, problem, planner(), time_limit_seconds=60.0)
    assert error.message == caught.value.message
    assert "of usable memory each" in error.hint
    assert " ms a step" in error.hint


def test_one_layer_on_one_device() -> None:
    problem = chain_problem(1, 1, batch=1, memory_bytes=1000, time_limit_seconds=0.5)
    found = find_remedies(problem, planner(), time_limit_seconds=30.0)
    assert [remedy.words[:12] for remedy in found] == ["devices with"]


@pytest.mark.parametrize("wanted", [{}, PINNED, {"schedule": Schedule.ONE_F_ONE_B}])
def test_without_time_enough_memory_is_named_all_the_same(wanted: dict[str, Any]) -> None:
    """Memory is monotone: what a plan takes without a limit is enough for it."""
    problem = chain_problem(memory_bytes=10**4, **TIGHT, **wanted)
    found = find_remedies(problem, planner(), time_limit_seconds=0.0)
    enough = dataclasses.replace(problem, memory_limit_bytes=memory_remedy(found))
    (remedy,) = found
    simulated = simulator(planner()(enough))(remedy.placement)
    assert simulated.fits(limits_of(enough, remedy.placement))
    assert meets(problem.constraints, remedy.placement)
    assert ", perhaps less" in remedy.words


def test_where_nothing_helps_that_is_said() -> None:
    """No memory, batch or number of devices gives GPipe several stages per rank."""
    demands: dict[str, Any] = {"schedule": Schedule.GPIPE, "stages_per_rank": 2}
    problem = chain_problem(4, 2, batch=4, **demands)
    found = find_remedies(problem, planner(), time_limit_seconds=1.5)
    assert all(remedy.size == 0 for remedy in found)
    assert {remedy.words for remedy in found} <= {"1 stage per rank", "the layered schedule"}
    error = with_remedies(
        InfeasibleError("nothing fits"), problem, planner(), time_limit_seconds=0.0
    )
    assert error.message == "nothing fits"
    assert "no single change" in error.hint


def test_a_change_that_alters_nothing_is_no_remedy() -> None:
    """With the whole mesh demanded more devices stay idle; offload is not forbidden, so that to
    demand it changes nothing; and recompute is what is demanded already."""
    demands = {"num_replicas": 1, "num_pipeline_ranks": 2, "recompute": True}
    problem = chain_problem(memory_bytes=10**6, num_elements=150_000, **TIGHT, **demands)
    words = " ".join(
        remedy.words for remedy in find_remedies(problem, planner(), time_limit_seconds=3.0)
    )
    assert "usable memory" in words
    assert not any(word in words for word in ("2 devices", "offload", "recompute the act"))
