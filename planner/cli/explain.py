"""Options of lga-plan that explain a plan: --explain, --pareto, --compare, --what-if.

Knows the options, and what each prints. Does not know how anything is found.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from planner.cli.what_if import WHAT_IF_KEYS, parse_what_if
from planner.cluster.types import Cluster
from planner.console import check_can_write, console, error_console
from planner.errors import ClusterError, UsageError
from planner.explain.changes import ClusterAt, WhatIf, changed, grown, resolve
from planner.explain.comparison import check_same_model, compare_plans, side_of
from planner.explain.explanation import explain
from planner.explain.frontier import Point, time_and_devices, time_and_memory
from planner.explain.remedies import find_remedies
from planner.explain.types import PlannerFor
from planner.files import write_text
from planner.graph import LayerGraph
from planner.pipeline import PlanResult
from planner.plan.file import read_plan
from planner.plan.types import Plan
from planner.report import (
    better_lines,
    bottleneck_lines,
    device_curve,
    families_table,
    frontier_table,
    frontiers_csv,
    frontiers_html,
    frontiers_svg,
    memory_curve,
    nothing_fits_lines,
    offers_table,
    plot_text,
    sides_table,
)

__all__ = ["Questions", "answer", "explain_options", "larger_clusters"]

_SECONDS_EACH = 3.0
"""For each problem that is solved again, unless --time-limit is shorter."""
_SUFFIXES = (".html", ".svg", ".csv")
_PLOT_COLUMNS = 76


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What the user wants to know beside the plan."""

    explain: bool
    pareto: bool
    pareto_output: Path | None
    compare: Path | None
    what_if: str | None

    def check(self, inputs: Sequence[str | Path]) -> None:
        """Refuse now what would be refused when the plan is made.

        Raises:
            UsageError: a value is wrong, or a file cannot be written or read.
        """
        output = self.pareto_output
        if output is not None and output.suffix.lower() not in _SUFFIXES:
            raise UsageError(
                f"--pareto-output {output} is no known kind of file",
                hint=f"a name that ends in {', '.join(_SUFFIXES)}",
            )
        if output is not None:
            check_can_write(output, "--pareto-output", inputs)
        if self.what_if is not None:
            parse_what_if(self.what_if)
        if self.compare is not None:
            read_plan(self.compare)

    def check_model(self, graph: LayerGraph) -> None:
        """Refuse to compare with a plan of another model.

        Raises:
            FingerprintError: it is one.
        """
        if self.compare is not None:
            check_same_model(read_plan(self.compare), graph.model_name, graph.fingerprint)


def explain_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which gets their values as `questions`."""

    @functools.wraps(command)
    def packed(
        *,
        explain: bool,
        pareto: bool,
        pareto_output: Path | None,
        compare: Path | None,
        what_if: str | None,
        **others: Any,
    ) -> None:
        command(
            **others,
            questions=Questions(
                explain=explain,
                pareto=pareto or pareto_output is not None,
                pareto_output=pareto_output,
                compare=compare,
                what_if=what_if,
            ),
        )

    options = (
        click.option(
            "--explain",
            is_flag=True,
            help="Say what bounds the step, what more memory, devices or bandwidth would buy, and "
            "why the best plan of each family lost. Solves about twenty more problems.",
        ),
        click.option(
            "--pareto",
            is_flag=True,
            help="Solve for less and less memory and for fewer devices: both frontiers as tables "
            "and plots.",
        ),
        click.option(
            "--pareto-output",
            type=click.Path(path_type=Path),
            help="File to write the frontiers to (.html, .svg or .csv); implies --pareto.",
        ),
        click.option(
            "--compare",
            type=click.Path(path_type=Path),
            help="A plan of the same model: show it beside the new one.",
        ),
        click.option(
            "--what-if",
            metavar="CHANGES",
            help="Solve again on a changed cluster, such as bandwidth=25Gbps,memory=40GB,gpus=16 "
            f"(keys: {', '.join(WHAT_IF_KEYS)}), and show both plans.",
        ),
    )
    decorated: Callable[..., None] = packed
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def answer(questions: Questions, result: PlanResult, cluster_at: ClusterAt) -> None:
    """Print what was asked. `cluster_at` is the user's cluster with so many devices."""
    planner_for = result.prepared.planner_for
    if questions.compare is not None:
        _print_comparison(result, questions.compare)
    if questions.explain:
        _print_explanation(result, planner_for, cluster_at)
    if questions.what_if is not None:
        what_if = parse_what_if(questions.what_if)
        _print_what_if(result, planner_for, cluster_at, questions.what_if, what_if)
    if questions.pareto:
        _print_frontiers(result, planner_for, questions.pareto_output)


def larger_clusters(own: Cluster, cluster_named: Callable[[int], Cluster]) -> ClusterAt:
    """The named cluster where it has so many devices, else more hosts like the largest."""

    def cluster_at(num_devices: int) -> Cluster:
        try:
            larger = cluster_named(num_devices)
        except ClusterError:
            return grown(own, num_devices)
        known = {host.device.name: host.device for host in own.hosts}
        hosts = (
            replace(host, device=known.get(host.device.name, host.device)) for host in larger.hosts
        )
        return replace(larger, hosts=tuple(hosts))

    return cluster_at


def _seconds_each(result: PlanResult) -> float:
    return min(_SECONDS_EACH, result.prepared.problem.time_limit_seconds)


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _print_explanation(result: PlanResult, planner_for: PlannerFor, cluster_at: ClusterAt) -> None:
    step = result.simulation.step_seconds
    with error_console.status("explaining") as status:
        found = explain(
            result.prepared.problem,
            planner_for,
            result.solution.placement,
            (result.plan, result.simulation),
            cluster_at=cluster_at,
            time_limit_seconds=_seconds_each(result),
            tell=lambda words: status.update(f"explaining: {words}"),
        )
    _print_lines(bottleneck_lines(found.bottleneck))
    console.print(offers_table(found.offers, step))
    console.print(families_table(found.verdicts, step))
    _print_lines(better_lines(found))


def _print_comparison(result: PlanResult, path: Path) -> None:
    existing = read_plan(path)
    found = compare_plans(result.plan, result.simulation, existing)
    console.print(sides_table("compared", {"new": found.new, path.name: found.existing}))
    ratio = found.ratio
    words = "faster" if ratio < 1 else "slower"
    moved = found.moved_layers
    _print_lines(
        [
            f"compared  the new plan is {abs(1 - ratio):.1%} {words}"
            if abs(1 - ratio) >= 0.0005
            else "compared  both take the same",
            f"moved     {len(moved)} of {len(result.plan.layer_names)} layers are in another stage "
            "or on another rank"
            + (f": {', '.join(moved[:6])}{', ...' if len(moved) > 6 else ''}" if moved else ""),
        ]
    )


def _print_what_if(
    result: PlanResult,
    planner_for: PlannerFor,
    cluster_at: ClusterAt,
    words: str,
    what_if: WhatIf,
) -> None:
    problem = changed(result.prepared.problem, what_if, cluster_at)
    limit = problem.time_limit_seconds
    with error_console.status(f"solving with {words}"):
        found = resolve(
            words,
            problem,
            planner_for,
            known=result.solution.placement,
            time_limit_seconds=limit,
        )
    if found.placement is None:
        with error_console.status("looking for what would fit there"):
            remedies = find_remedies(
                problem, planner_for, cluster_at=cluster_at, time_limit_seconds=limit
            )
        _print_lines(nothing_fits_lines(words, found.why_none, remedies))
        return
    sides = {
        "as it is": side_of(result.plan, result.simulation),
        words: side_of(*planner_for(problem)(found.placement)),
    }
    console.print(sides_table("what if", sides))


def _print_frontiers(result: PlanResult, planner_for: PlannerFor, output: Path | None) -> None:
    problem, each = result.prepared.problem, _seconds_each(result)
    with error_console.status("frontiers") as status:

        def tell(words: str) -> None:
            status.update(f"frontiers: {words}")

        memory = time_and_memory(problem, planner_for, time_limit_seconds=each, tell=tell)
        devices = time_and_devices(problem, planner_for, time_limit_seconds=each, tell=tell)
    for title, make, points in (
        ("time and memory", memory_curve, memory),
        ("time and devices", device_curve, devices),
    ):
        if points:
            console.print(frontier_table(title, points))
            for line in plot_text(make(points), width=_PLOT_COLUMNS):
                console.print(line, no_wrap=True, overflow="crop")
    if output is not None:
        write_text(output, _frontier_file(result.plan, memory, devices, output.suffix.lower()))
        _print_lines([f"frontiers written to {output}"])


def _frontier_file(
    plan: Plan, memory: Sequence[Point], devices: Sequence[Point], suffix: str
) -> str:
    if suffix == ".csv":
        return frontiers_csv(memory, devices)
    if suffix == ".svg":
        return frontiers_svg(memory, devices)
    return frontiers_html(plan.model_name, memory, devices)
