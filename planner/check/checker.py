"""The rules, one verdict each: a proof, or the first counterexample."""

from planner.check.rules import memory_fits, run_on_symbols, state_traffic
from planner.check.structure import (
    every_layer_once,
    every_pass_once,
    keyed_randomness,
    layered_order,
)
from planner.check.table import program_table
from planner.check.transfers import transfers_match
from planner.check.types import Failure, Report, Verdict
from planner.plan.types import Plan
from planner.plan.validate import validate_references

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


def check(plan: Plan) -> Report:
    """Prove the plan against every rule.

    Raises:
        PlanFileError: the plan refers to something that it does not hold.
    """
    validate_references(plan)
    failures: dict[int, Failure | None] = {
        **run_on_symbols(plan),
        1: every_layer_once(plan),
        2: every_pass_once(plan),
        3: layered_order(plan),
        4: transfers_match(plan),
        7: memory_fits(plan),
        8: state_traffic(plan),
        9: keyed_randomness(plan),
    }
    return Report(verdicts=tuple(_verdict(plan, number, failures.get(number)) for number in RULES))


def _verdict(plan: Plan, number: int, failure: Failure | None) -> Verdict:
    note = ""
    if number == 7 and plan.prediction is None:
        note = "the plan names no limit"
    if failure is None:
        return Verdict(number=number, title=RULES[number], passed=True, note=note)
    table = program_table(plan, failure.cells)
    return Verdict(
        number=number,
        title=RULES[number],
        passed=False,
        counterexample="\n".join(part for part in (failure.message, table) if part),
    )
