"""The best plan of each family: in the family, fitting, and as fast as exhaustive search finds."""

import dataclasses
import itertools

import pytest
from explain_problems import chain_problem, planned, planner

from planner.errors import UsageError
from planner.explain.explanation import Explanation, compare_families, explain
from planner.explain.families import FAMILIES, Family, best_of_family, contains
from planner.explain.shares import find_bottleneck
from planner.explain.types import limits_of, simulator
from planner.schedules import Schedule
from planner.solve import Placement, Problem, solve

BY_NAME = {family.name: family for family in FAMILIES}


def fits(problem: Problem, placement: Placement, peaks: tuple[int, ...]) -> bool:
    limits = limits_of(problem, placement)
    return all(peak <= limit for peak, limit in zip(peaks, limits, strict=True))


SLOW = ("no recompute", "recompute all")
"""Families for whose bound the solver takes its time."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BY_NAME],
)
def test_the_best_of_a_family_belongs_to_it_and_fits(name: str) -> None:
    problem, family = chain_problem(6, 4, batch=16), BY_NAME[name]
    simulate = simulator(planned(problem))
    found = best_of_family(problem, simulate, family, time_limit_seconds=3.0)
    assert found.placement is not None, found.why_none
    assert contains(family, found.placement)
    simulated = simulate(found.placement)
    assert simulated.step_seconds == found.step_seconds
    assert fits(problem, found.placement, simulated.peak_bytes)
    assert found.placement.global_batch_size == 16


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_layer_on_one_device(family: Family) -> None:
    problem = chain_problem(1, 1, batch=1)
    found = best_of_family(problem, simulator(planned(problem)), family, time_limit_seconds=3.0)
    assert (found.placement is None) == bool(found.why_none)
    if found.placement is not None:
        assert contains(family, found.placement)


def every_placement(schedule: Schedule, num_layers: int, batch: int) -> list[Placement]:
    """Of one replica on two ranks, one stage each."""
    found = []
    for cut, size, again in itertools.product(
        range(1, num_layers), (1, 2, 4, 8), itertools.product((False, True), repeat=2)
    ):
        if batch % size == 0:
            found.append(
                Placement(
                    num_replicas=1,
                    num_pipeline_ranks=2,
                    boundaries=(0, cut, num_layers),
                    stage_ranks=(0, 1),
                    micro_batch_size=size,
                    num_micro_batches=batch // size,
                    partition=0,
                    recompute=again,
                    num_weight_buffers=1,
                    num_gradient_buffers=1,
                    schedule=schedule,
                )
            )
    return found


@pytest.mark.parametrize("memory_bytes", [10**9, 12 * 10**6])
@pytest.mark.parametrize("name", ["GPipe", "1F1B", "zero bubble (ZB-H1)"])
def test_as_fast_as_exhaustive_search(name: str, memory_bytes: int) -> None:
    problem = chain_problem(
        5, 2, batch=8, memory_bytes=memory_bytes, heavy=4, num_replicas=1, num_pipeline_ranks=2
    )
    simulate = simulator(planned(problem))
    best = min(
        simulated.step_seconds
        for placement in every_placement(BY_NAME[name].schedule, 5, 8)
        if fits(problem, placement, (simulated := simulate(placement)).peak_bytes)
        and len(set(placement.recompute)) == 1
    )
    found = best_of_family(problem, simulate, BY_NAME[name])
    assert found.step_seconds is not None, found.why_none
    assert found.step_seconds <= best * 1.02


def test_what_is_demanded_excludes_families() -> None:
    problem = chain_problem(6, 4, num_replicas=2, recompute=True)
    simulate = simulator(planned(problem))
    for name, words in (("pipeline only", "num replicas 2"), ("no recompute", "recompute True")):
        found = best_of_family(problem, simulate, BY_NAME[name], time_limit_seconds=3.0)
        assert found.placement is None
        assert words in found.why_none


def test_out_of_memory_names_bytes_and_rank() -> None:
    problem = chain_problem(6, 2, memory_bytes=10**4, num_pipeline_ranks=2)
    found = best_of_family(problem, simulator(planned(problem)), BY_NAME["1F1B"])
    assert found.placement is None
    assert "out of memory by" in found.why_none
    assert "on rank" in found.why_none


def test_contradictory_demands_are_told() -> None:
    problem = chain_problem(6, 2, num_pipeline_ranks=7)
    found = best_of_family(problem, simulator(planned(problem)), BY_NAME["1F1B"])
    with pytest.raises(UsageError) as caught:
        solve(problem, simulator(planned(problem)))
    assert found.why_none == caught.value.message


def test_losses_add_up_to_the_difference() -> None:
    problem = chain_problem(6, 4)
    made = planned(problem)
    placement = solve(problem, simulator(made)).placement
    families = [BY_NAME[name] for name in ("data parallel only", "layered", "1F1B", "GPipe")]
    verdicts = compare_families(
        problem, made, placement, made(placement), families=families, time_limit_seconds=3.0
    )
    _, simulation = made(placement)
    assert [v.is_plan for v in verdicts if v.result.family.name == "layered"] == [True]
    for verdict in verdicts:
        assert verdict.ratio is not None
        difference = (verdict.ratio - 1) * simulation.step_seconds
        assert sum(loss.more_seconds for loss in verdict.losses) == pytest.approx(
            difference, abs=1e-9
        )
        seconds = [loss.more_seconds for loss in verdict.losses]
        assert seconds == sorted(seconds, reverse=True)


def test_a_better_family_is_told() -> None:
    """A plan that is made worse on purpose is beaten, and the explanation says by which family."""
    problem = chain_problem(6, 4)
    made = planned(problem)
    placement = solve(problem, simulator(made)).placement
    slow = dataclasses.replace(placement, recompute=(True,) * placement.num_stages)
    verdicts = compare_families(
        problem,
        made,
        slow,
        made(slow),
        families=[BY_NAME[name] for name in ("data parallel only", "1F1B", "pipeline only")],
        time_limit_seconds=3.0,
    )
    bottleneck = find_bottleneck(*made(slow), limits_of(problem, slow))
    found = Explanation(bottleneck=bottleneck, offers=(), verdicts=verdicts)
    assert found.better is not None
    assert found.better.ratio is not None
    assert found.better.ratio < 1
    assert found.better.ratio == min(v.ratio for v in found.verdicts if v.ratio is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "devices", "batch"), [(6, 4, 16), (1, 1, 1)])
def test_all_of_it(layers: int, devices: int, batch: int) -> None:
    problem = chain_problem(layers, devices, batch=batch)
    made = planner()
    placement = solve(problem, simulator(made(problem))).placement
    found = explain(problem, made, placement, made(problem)(placement), time_limit_seconds=3.0)
    assert len(found.verdicts) == len(FAMILIES)
    assert any(verdict.is_plan for verdict in found.verdicts)
    assert found.offers
