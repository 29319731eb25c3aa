"""`lga-check PLAN`: prove a plan against every rule, or show what breaks one."""

import math
from pathlib import Path

import click
from rich.text import Text

from planner.check import check
from planner.console import HELP, command_errors, console
from planner.errors import CheckError
from planner.plan.file import read_plan
from planner.plan.types import Plan
from planner.report import rules_table, seconds_text
from planner.schedules import Schedule
from planner.simulate import simulate

__all__ = ["main"]


@click.command(context_settings=HELP)
@click.argument("plan", type=click.Path(path_type=Path))
@command_errors()
def main(plan: Path) -> None:
    """Prove the plan file PLAN against every rule, and its predicted step against a simulation.

    Prints a verdict for each rule. Where one is broken, prints the counterexample and exits with 1;
    so it does where the plan's own figures are not those of its instructions. A file that is
    damaged, edited or no plan is refused with exit code 2.
    """
    read = read_plan(plan)
    report = check(read)
    console.print(rules_table(report))
    for verdict in report.failures:
        console.print(Text(f"\nrule {verdict.number}: {verdict.title}"), soft_wrap=True)
        console.print(Text(verdict.counterexample), soft_wrap=True)
    if not report.passed:
        numbers = ", ".join(str(verdict.number) for verdict in report.failures)
        raise CheckError(f"{plan} breaks rule {numbers}", hint="make the plan again with lga-plan")
    _check_claims(plan, read)


def _check_claims(path: Path, plan: Plan) -> None:
    """Simulate the plan again: its step and peaks must be those that it predicts.

    Raises CheckError where they differ, or where the step is below what is claimed to be a bound.
    """
    claimed = plan.prediction
    if claimed is None:
        return
    found = simulate(plan)
    claims = {
        "the step in seconds": (claimed.step_seconds, found.step_seconds),
        **{
            f"the peak of rank {rank} in bytes": pair
            for rank, pair in enumerate(zip(claimed.peak_bytes, found.peak_bytes, strict=True))
        },
    }
    for what, (said, is_so) in claims.items():
        if not math.isclose(said, is_so, rel_tol=1e-9):
            raise CheckError(
                f"{path} says that {what} is {said}, but simulated again it is {is_so}",
                hint="make the plan again with lga-plan",
            )
    bound = claimed.bound_seconds
    if bound is not None and bound > found.step_seconds * (1 + 1e-9):
        raise CheckError(
            f"{path} says that no plan takes less than {bound} s, but it takes "
            f"{found.step_seconds} s itself",
            hint="make the plan again with lga-plan",
        )
    words = f"simulated {seconds_text(found.step_seconds)}, as the plan says"
    if bound is not None:
        words += f"; the gap to its bound is {max(0.0, 1 - bound / found.step_seconds):.2%}"
        words += f", which is of {_bounded(plan)}"
    console.print(Text(words), soft_wrap=True)


def _bounded(plan: Plan) -> str:
    """The plans that its bound speaks of: those that keep to the rules that it keeps to itself."""
    ranks = plan.num_pipeline_ranks
    is_modular = all(stage.rank == stage.index % ranks for stage in plan.stages)
    if plan.schedule is Schedule.LAYERED and is_modular and plan.num_stages % ranks == 0:
        return "layered plans with stage s on rank s mod P"
    return "plans of every schedule, with stages on any ranks"
