"""The checker's verdict on a plan beside the oracle's, and seeded mutants to compare them on."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mutations import mutate
from oracle import OracleResult, judge
from small_plans import small_plan

from planner.check import check
from planner.errors import PlanFileError
from planner.plan.types import Plan, Prediction
from planner.simulate.memory import peak_memory

__all__ = ["Comparison", "accepts", "bound_bytes", "compare", "mutants", "with_limit"]

_MUTANTS_PER_PLAN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two verdicts on one plan, memory left aside."""

    accepted: bool
    """By the checker."""
    reasons: dict[int, str]
    """Why the checker refuses it, by rule; 0 for references to what the plan does not hold."""
    oracle: OracleResult
    bound_bytes: tuple[int, ...]
    """The checker's bound on each rank's memory; empty where both refuse the plan."""

    @property
    def agrees(self) -> bool:
        return self.accepted == (not self.oracle.faults)

    @property
    def slack_bytes(self) -> tuple[int, ...]:
        """Of a harmless plan: the checker's bound less the exact peak, per rank."""
        pairs = zip(self.bound_bytes, self.oracle.peak_bytes, strict=True)
        return tuple(bound - peak for bound, peak in pairs)

    def explain(self) -> str:
        """Both verdicts, for messages."""
        faults = [f"{fault.kind}: {fault.message}" for fault in self.oracle.faults]
        return f"checker: {self.reasons or 'accepted'}\noracle: {faults or 'accepted'}"


def compare(plan: Plan) -> Comparison:
    """Judge a plan by both."""
    oracle = judge(plan)
    reasons = _reasons(plan)
    return Comparison(
        accepted=not reasons,
        reasons=reasons,
        oracle=oracle,
        bound_bytes=() if oracle.faults else bound_bytes(plan),
    )


def accepts(plan: Plan) -> bool:
    """Whether the checker does."""
    return not _reasons(plan)


def bound_bytes(plan: Plan) -> tuple[int, ...]:
    """What the checker compares with the limit, per rank."""
    plans = (plan, plan.forward_only()) if plan.evaluation else (plan,)
    return tuple(
        max(memory.total_bytes for memory in moments)
        for moments in zip(*map(peak_memory, plans), strict=True)
    )


def mutants(num_mutants: int, seed: int) -> Iterator[tuple[str, Plan]]:
    """(kinds of mutation, mutant) of as many plans as it takes."""
    chooser = random.Random(seed)
    for number in range(num_mutants):
        if number % _MUTANTS_PER_PLAN == 0:
            plan = small_plan(chooser)
        yield mutate(plan, chooser)


def with_limit(plan: Plan, memory_limit_bytes: int) -> Plan:
    """The plan with this limit on every rank's memory."""
    prediction = Prediction(
        step_seconds=1.0,
        bubble=0.0,
        peak_bytes=(0,) * plan.num_pipeline_ranks,
        memory_limit_bytes=memory_limit_bytes,
        provenance="made for a test",
    )
    return replace(plan, prediction=prediction)


def _reasons(plan: Plan) -> dict[int, str]:
    try:
        failures = check(plan).failures
    except PlanFileError as error:
        return {0: str(error)}
    return {verdict.number: verdict.counterexample for verdict in failures}
