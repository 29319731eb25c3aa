"""`lga-check PLAN`: prove a plan against every rule, or show what breaks one."""

from pathlib import Path

import click
from rich.text import Text

from planner.check import check
from planner.console import HELP, command_errors, console
from planner.errors import CheckError
from planner.plan.file import read_plan
from planner.report import rules_table

__all__ = ["main"]


@click.command(context_settings=HELP)
@click.argument("plan", type=click.Path(path_type=Path))
@command_errors()
def main(plan: Path) -> None:
    """Prove the plan file PLAN against every rule.

    Prints a verdict for each rule. Where one is broken, prints the counterexample and exits with 1.
    A file that is damaged, edited or no plan is refused with exit code 2.
    """
    report = check(read_plan(plan))
    console.print(rules_table(report))
    for verdict in report.failures:
        console.print(Text(f"\nrule {verdict.number}: {verdict.title}"), soft_wrap=True)
        console.print(Text(verdict.counterexample), soft_wrap=True)
    if not report.passed:
        numbers = ", ".join(str(verdict.number) for verdict in report.failures)
        raise CheckError(f"{plan} breaks rule {numbers}", hint="make the plan again with lga-plan")
