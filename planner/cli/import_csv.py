"""`lga-import CSV`: a schedule of torch.distributed.pipelining as a plan to check and simulate."""

from dataclasses import replace
from pathlib import Path

import click
from rich.text import Text

from planner.check import check
from planner.cluster.resolve import resolve_cluster
from planner.console import HELP, SAMPLES, check_can_write, command_errors, console
from planner.errors import CheckError, UsageError
from planner.export.skeleton import StageCosts, ideal_cluster, skeleton_plan
from planner.export.torch_import import parse_csv
from planner.files import read_text
from planner.plan.file import write_plan
from planner.plan.types import Plan, Prediction
from planner.report import parse_bytes, plan_lines, rules_table, seconds_text
from planner.simulate import simulate

__all__ = ["main"]

_MAX_CSV_BYTES = 32_000_000
_MAX_STEP_SECONDS = 1e9
_EXAMPLE = "a CSV such as torch's _dump_csv and lga-show --csv write"


def _seconds_each(_: click.Context, __: click.Parameter, text: str) -> tuple[float, ...]:
    """`0.5`, or `0.5,0.25,...`: finite numbers from 0."""
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 0.5,0.25.") from None
    if not all(0 <= seconds < 1e9 for seconds in found):
        raise click.BadParameter(f"{text!r} has a number that is no duration.")
    return found


@click.command(context_settings=HELP)
@click.argument("csv", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write the plan to  [default: CSV's name with .plan.yaml, in this folder]",
)
@click.option(
    "--forward-seconds",
    callback=_seconds_each,
    metavar="SECONDS,...",
    default="1",
    show_default=True,
    help="Of one micro-batch through a stage: one number, or one for each stage after a comma.",
)
@click.option(
    "--backward-seconds",
    callback=_seconds_each,
    metavar="SECONDS,...",
    default="2",
    show_default=True,
    help="Of one micro-batch back through a stage, both halves together.",
)
@click.option(
    "--weight-seconds",
    callback=_seconds_each,
    metavar="SECONDS,...",
    default="1",
    show_default=True,
    help="The part of it that finds the weights' gradients (W).",
)
@click.option("--tensor-size", default="4B", show_default=True, help="Of what a stage hands on.")
@click.option(
    "--parameters", type=SAMPLES, default=1, show_default=True, help="Of each stage, float32."
)
@click.option(
    "--cluster",
    help="As in lga-plan  [default: an ideal one, on which only the given seconds pass]",
)
@command_errors()
def main(
    csv: Path,
    output: Path | None,
    forward_seconds: tuple[float, ...],
    backward_seconds: tuple[float, ...],
    weight_seconds: tuple[float, ...],
    tensor_size: str,
    parameters: int,
    cluster: str | None,
) -> None:
    """Make a plan of the schedule in CSV, in either of torch's forms.

    The plan has a made-up layer for each stage, with the given costs: it can be checked, shown and
    exported again, but not run.
    """
    output = output or Path(csv.name.removesuffix(".csv") + ".plan.yaml")
    check_can_write(output, "--output", [csv])
    text = read_text(csv, most_bytes=_MAX_CSV_BYTES, wanted=_EXAMPLE)
    schedule = parse_csv(text, source=str(csv))
    num_ranks = len(schedule.order.ranks)
    costs = StageCosts(
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        backward_weight_seconds=weight_seconds,
        tensor_bytes=parse_bytes(tensor_size),
        num_parameters=parameters,
    )
    machine = ideal_cluster(num_ranks) if cluster is None else resolve_cluster(cluster, num_ranks)
    plan = skeleton_plan(schedule, costs, machine, name=csv.stem)
    _print_and_check(plan, csv)
    plan = _predicted(plan)
    if schedule.is_renumbered:
        console.print(
            "micro-batches have new numbers: those of the order of their backward passes",
            soft_wrap=True,
        )
    write_plan(plan, output)
    console.print(f"plan written to {output}", soft_wrap=True)


def _predicted(plan: Plan) -> Plan:
    """With its prediction, which is printed.

    Raises:
        UsageError: a step takes longer than a plan file may say.
    """
    simulation = simulate(plan)
    if simulation.step_seconds > _MAX_STEP_SECONDS:
        raise UsageError(
            f"a step of {simulation.step_seconds:.0f} s is more than the {_MAX_STEP_SECONDS:.0f} s "
            "that a plan can have",
            hint="give smaller seconds of stages",
        )
    words = f"step      {seconds_text(simulation.step_seconds)}, bubble {simulation.bubble:.1%}"
    console.print(Text(words), soft_wrap=True)
    devices = [plan.cluster.device(rank) for rank in range(plan.world_size)]
    prediction = Prediction(
        step_seconds=simulation.step_seconds,
        bubble=simulation.bubble,
        peak_bytes=simulation.peak_bytes,
        memory_limit_bytes=min(d.usable_bytes for d in devices),
        provenance=f"simulated on {plan.cluster.name} with given costs of stages",
    )
    return replace(plan, prediction=prediction)


def _print_and_check(plan: Plan, csv: Path) -> None:
    """Say what the schedule is; refuse it where it breaks a rule.

    Raises:
        CheckError: it does.
    """
    for line in plan_lines(plan):
        console.print(Text(line), soft_wrap=True)
    report = check(plan)
    console.print(rules_table(report))
    for verdict in report.failures:
        console.print(Text(f"\nrule {verdict.number}: {verdict.title}"), soft_wrap=True)
        console.print(Text(verdict.counterexample), soft_wrap=True)
    if not report.passed:
        numbers = ", ".join(str(verdict.number) for verdict in report.failures)
        raise CheckError(
            f"the schedule in {csv} breaks rule {numbers}", hint="see the counterexample above"
        )
