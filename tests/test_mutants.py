"""The checker against the oracle: the same verdict on random plans and on their mutants."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from comparison import accepts, bound_bytes, compare, mutants, with_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS
from small_plans import small_plan
from table_mutations import changed_tables

from planner.errors import PlanFileError
from planner.plan.types import Opcode, Plan
from planner.plan.validate import validate_references


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(min_value=0, max_value=2**32))
def test_lowered_plans_pass_both(seed: int) -> None:
    plan = small_plan(random.Random(seed), max_instructions=90)
    found = compare(plan)
    assert found.accepted, found.explain()
    assert found.agrees, found.explain()
    assert min(found.slack_bytes) >= 0


def test_verdicts_agree_on_500_mutants() -> None:
    compare_mutants(500, 0, {2, 3, 4, 5, 6})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_verdicts_agree_on_10_000_mutants() -> None:
    compare_mutants(10_000, 1, {2, 3, 4, 5, 6, 8})


def compare_mutants(num_mutants: int, seed: int, rules: set[int]) -> None:
    """No harmful mutant accepted, no harmless one refused, no bound below the exact peak.

    Without any of `rules` the checker would have accepted a harmful one.
    """
    harmless: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    alone: set[int] = set()
    slack: list[int] = []
    for number, (kinds, mutant) in enumerate(mutants(num_mutants, seed)):
        found = compare(mutant)
        assert found.agrees, f"mutant {number} of seed {seed}, {kinds}\n{found.explain()}"
        seen.update(kinds.split(" + "))
        if len(found.reasons) == 1:
            alone.update(found.reasons)
        if not found.oracle.faults:
            harmless.update(kinds.split(" + "))
            slack += found.slack_bytes
            assert min(found.slack_bytes) >= 0, f"mutant {number} of seed {seed}, {kinds}"
    print(f"{num_mutants} mutants, harmless: {dict(harmless)}")
    print(
        f"memory bound above the exact peak: {sum(slack) / len(slack)} bytes, at most {max(slack)}"
    )
    # Both verdicts occurred often enough to mean something.
    assert seen.keys() == MUTATIONS.keys()
    assert alone >= rules
    assert 0.03 * num_mutants < len(slack) < num_mutants


def test_limits_of_memory() -> None:
    """At its bound the checker accepts; a byte below the exact peak it never does."""
    for seed in range(30):
        plan = small_plan(random.Random(seed))
        found = compare(plan)
        peak, bound = max(found.oracle.peak_bytes), max(bound_bytes(plan))
        assert accepts(with_limit(plan, bound))
        assert accepts(with_limit(plan, peak)) == (bound == peak)
        below = compare(with_limit(plan, peak - 1))
        assert not below.accepted
        assert below.oracle.kinds == {"memory"}


def test_every_pair_of_neighbours_exchanged() -> None:
    """With offloading: an EVICT only reads, so nothing orders it with a reader behind it."""
    num_harmless = num_harmful = 0
    for seed in range(100):
        plan = small_plan(random.Random(seed), max_instructions=40)
        if not any(line.opcode is Opcode.EVICT for program in plan.programs for line in program):
            continue
        for rank, program in enumerate(plan.programs):
            for index in range(len(program) - 1):
                pair = (program[index + 1], program[index])
                lines = (*program[:index], *pair, *program[index + 2 :])
                programs = (*plan.programs[:rank], lines, *plan.programs[rank + 1 :])
                found = compare(replace(plan, programs=programs))
                assert found.agrees, f"{index} of rank {rank}, seed {seed}\n{found.explain()}"
                num_harmless += found.accepted
                num_harmful += not found.accepted
        if num_harmless + num_harmful > 300:
            break
    assert min(num_harmless, num_harmful) > 50


def test_verdicts_agree_on_every_small_change_of_a_table() -> None:
    """Dangling references are refused before any rule is asked; the oracle has no word for them."""
    verdicts: Counter[bool] = Counter()
    for seed in range(8):
        plan = small_plan(random.Random(seed), max_instructions=40)
        for what, mutant in changed_tables(plan):
            found = compare(mutant) if is_whole(mutant) else None
            if found is not None:
                assert found.agrees, f"{what}, seed {seed}\n{found.explain()}"
                verdicts[found.accepted] += 1
    assert verdicts[True] > 50
    assert verdicts[False] > 200


def is_whole(plan: Plan) -> bool:
    """Whether everything that the plan refers to is there."""
    try:
        validate_references(plan)
    except PlanFileError:
        return False
    return True
