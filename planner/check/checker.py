"""The rules, one verdict each: a proof, or the first counterexample."""

from planner.check.counts import count_failures
from planner.check.rules import claims_traffic, memory_fits, run_on_symbols, state_traffic
from planner.check.structure import (
    every_layer_once,
    every_pass_once,
    keyed_randomness,
    layered_order,
)
from planner.check.table import program_table
from planner.check.transfers import transfers_match
from planner.check.types import Failure, Report, Verdict
from planner.plan.dependencies import PartialOrder, partial_order
from planner.plan.types import Plan
from planner.plan.validate import validate_references
from planner.schedules import Schedule

__all__ = ["RULES", "check"]

RULES = {
    1: "every layer on exactly one pipeline rank",
    2: "every stage runs every micro-batch forward once and backward once",
    3: "the layered order on every rank",
    4: "every transfer has both ends, in an order that cannot deadlock",
    5: "nothing is read before it is written or after it is overwritten",
    6: "every gradient complete, reduced once, and applied once",
    7: "peak memory within the limit on every rank",
    8: "gathers and reductions do not grow with the number of micro-batches",
    9: "forward and recompute draw the same random keys, each operator its own",
    10: "tied parameters end the step equal",
}
_EVALUATION = "evaluation: "


def check(plan: Plan, order: PartialOrder | None = None) -> Report:
    """Prove the plan, and its evaluation, against every rule.

    Args:
        order: the plan's `partial_order`, if it is known already.

    Raises:
        PlanFileError: the plan refers to something that it does not hold.
    """
    validate_references(plan)
    order = order or partial_order(plan)
    failures, runs = _failures(plan, order)
    found = {number: _counterexample(plan, failure) for number, failure in failures.items()}
    if plan.evaluation:
        evaluation = plan.forward_only()
        failures, evaluation_runs = _failures(evaluation, partial_order(evaluation))
        runs = runs and evaluation_runs
        for number, failure in failures.items():
            found.setdefault(number, _EVALUATION + _counterexample(evaluation, failure))
    return Report(
        verdicts=tuple(
            Verdict(
                number=number,
                title=title,
                passed=number not in found,
                counterexample=found.get(number, ""),
                note=_note(plan, number, runs),
            )
            for number, title in RULES.items()
        )
    )


def _failures(plan: Plan, order: PartialOrder) -> tuple[dict[int, Failure], bool]:
    """The first failure of each rule that is broken, by number; whether all instructions run."""
    tasks = order.sorted_tasks()
    found = {
        1: every_layer_once(plan),
        2: every_pass_once(plan),
        3: layered_order(plan),
        4: transfers_match(plan, order, tasks),
        7: memory_fits(plan, order),
        8: state_traffic(plan),
        9: keyed_randomness(plan),
    }
    failures = {number: failure for number, failure in found.items() if failure is not None}
    for more in (count_failures(plan), run_on_symbols(plan, order, tasks)):
        for number, failure in more.items():
            failures.setdefault(number, failure)
    return failures, len(tasks) == len(order.members)


def _counterexample(plan: Plan, failure: Failure) -> str:
    table = program_table(plan, failure.cells)
    return "\n".join(part for part in (failure.message, table) if part)


def _note(plan: Plan, number: int, runs: bool) -> str:
    """What a verdict does not claim, and why."""
    if number in (5, 6, 10) and not runs:
        return "only of what runs before the deadlock"
    evaluates = plan.schedule is Schedule.FORWARD
    if number == 7 and plan.prediction is None:
        return "the plan names no limit"
    if evaluates and number in (2, 3, 6, 10):
        return "evaluation: no backward"
    if number == 3 and plan.schedule is not Schedule.LAYERED:
        what = "sums" if plan.schedule is Schedule.CUSTOM else "forward passes and sums"
        return f"{plan.schedule.value} does not claim it, only {what} in ascending micro-batches"
    if number == 8 and not claims_traffic(plan):
        return f"{plan.schedule.value} does not claim it"
    return ""
