"""The best order of compute against every family's: `python benchmarks/order.py`.

A chain of layers, one per stage, is ordered by CP-SAT with as much memory as it wants, and with as
much as 1F1B needs on one stage per rank of the same layers. Families are simulated with the same
layers and transfers, on one stage per rank and on several. Search times are of this machine's
processor; columns of families are their times over the best order's, in brackets where they have
not the memory.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import click
from rich.console import Console
from rich.table import Table

from planner.export.skeleton import StageCosts, chain_model, ideal_cluster
from planner.lower import lower
from planner.order import OrderFound, find_order
from planner.plan.types import Plan, PlanOptions
from planner.schedule import Order
from planner.schedules import Schedule
from planner.simulate import Simulation, simulate
from planner.solve.types import Placement

SAVED_BYTES = 10**6
"""Of one layer and micro-batch: so much that boundary tensors do not matter."""
SIZES = "2x2x8 4x2x8 8x2x8 8x2x16"
ONE_STAGE = (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pipeline of so many ranks and loops, and its costs."""

    num_ranks: int
    loops: int
    num_micro_batches: int
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    costs: str
    """In words."""

    def placement(self, loops: int, schedule: Schedule = Schedule.LAYERED) -> Placement:
        """All layers in `loops` stages per rank."""
        num_layers, num_stages = self.num_ranks * self.loops, self.num_ranks * loops
        return Placement(
            num_replicas=1,
            num_pipeline_ranks=self.num_ranks,
            boundaries=tuple(range(0, num_layers + 1, num_layers // num_stages)),
            stage_ranks=tuple(stage % self.num_ranks for stage in range(num_stages)),
            micro_batch_size=1,
            num_micro_batches=self.num_micro_batches,
            partition=0,
            recompute=(False,) * num_stages,
            schedule=schedule,
        )


@click.command()
@click.option("--sizes", default=SIZES, show_default=True, help="RANKSxLOOPSxMICROBATCHES, ...")
@click.option(
    "--seeds",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Cases of unequal costs of each size, beside the one of equal costs.",
)
@click.option("--seconds", default=30.0, show_default=True, help="For CP-SAT, per case.")
@click.option("--memory", type=click.Choice(["tight", "loose", "both"]), default="both")
def main(sizes: str, seeds: int, seconds: float, memory: str) -> None:
    """Print a row per case: times, and every family's time over the best order's."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("ranks x loops x batches", "costs", "memory"):
        table.add_column(name)
    names = ("best", "bound", "gap", "search", "layered", "interleaved", "list", "GPipe", "1F1B",
             "ZB-H1", "to best family")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for size in sizes.split():
        for case in _cases(*map(int, size.split("x")), seeds):
            for kind in ("loose", "tight") if memory == "both" else (memory,):
                table.add_row(*_row(case, kind, seconds))
    Console(width=180).print(table)


def _cases(num_ranks: int, loops: int, count: int, seeds: int) -> list[Case]:
    num_layers = num_ranks * loops
    costs = [("equal", [1.0] * num_layers, [2.0] * num_layers)]
    for seed in range(seeds):
        pick = random.Random(seed)
        forward = [float(pick.randint(8, 14)) for _ in range(num_layers)]
        backward = [2 * seconds + pick.randint(-2, 2) for seconds in forward]
        costs.append((f"unequal {seed}", forward, backward))
    return [
        Case(
            num_ranks=num_ranks,
            loops=loops,
            num_micro_batches=count,
            forward_seconds=tuple(forward),
            backward_seconds=tuple(backward),
            costs=name,
        )
        for name, forward, backward in costs
    ]


def _row(case: Case, memory: str, seconds: float) -> list[str]:
    costs = StageCosts(
        forward_seconds=case.forward_seconds,
        backward_seconds=case.backward_seconds,
        backward_weight_seconds=tuple(each / 2 for each in case.backward_seconds),
    )
    graph, profile = chain_model(case.num_ranks * case.loops, costs)
    layers = tuple(replace(layer, saved_bytes=SAVED_BYTES) for layer in profile.layers)
    profile, cluster = replace(profile, layers=layers), ideal_cluster(case.num_ranks)

    @cache
    def planned(placement: Placement, order: Order | None) -> tuple[Plan, Simulation]:
        plan = lower(graph, profile, cluster, placement, PlanOptions(), order=order)
        return plan, simulate(plan)

    simulations = {s: planned(case.placement(1, s), None)[1] for s in ONE_STAGE}
    limit = max(simulations[Schedule.ONE_F_ONE_B].peak_bytes)
    if memory == "loose":
        limit = 10**15
    began = time.process_time()
    found = find_order(
        planned,
        case.placement(case.loops),
        (limit,) * case.num_ranks,
        time_limit_seconds=seconds,
    )
    took = time.process_time() - began
    if found is None:
        raise click.ClickException(f"nothing fits: {case}")
    others = [_ratio(found, [simulations[s]], limit) for s in ONE_STAGE]
    return [
        f"{case.num_ranks} x {case.loops} x {case.num_micro_batches}",
        case.costs,
        memory,
        f"{found.best.name} {found.step_seconds:g}",
        f"{found.bound_seconds:.6g}",
        "-" if found.gap is None else f"{found.gap:.2%}",
        f"{took:.1f} s",
        *(_ratio(found, _named(found, name), limit) for name in ("layered", "interleaved", "list")),
        *others,
        # ZB-H1 halves backward, which no order of this search does.
        _to_best_family(found, [simulations[s] for s in ONE_STAGE[:2]], limit),
    ]


def _named(found: OrderFound, name: str) -> list[Simulation]:
    return [tried.simulation for tried in found.tried if tried.name == name]


def _ratio(found: OrderFound, simulations: Sequence[Simulation], limit: int) -> str:
    """The fastest one's time over the best order's; in brackets where it has not the memory."""
    ranked = sorted((max(s.peak_bytes) > limit, s.step_seconds) for s in simulations)
    if not ranked:
        return "-"
    is_over, seconds = ranked[0]
    words = f"{seconds / found.step_seconds:.3f}"
    return f"({words})" if is_over else words


def _to_best_family(found: OrderFound, one_stage: Sequence[Simulation], limit: int) -> str:
    """The best order's time over that of the fastest family that fits in the same memory."""
    families = [t.simulation for t in found.tried if t.name not in ("list", "solved")]
    fitting = [s.step_seconds for s in (*families, *one_stage) if max(s.peak_bytes) <= limit]
    return f"{found.step_seconds / min(fitting):.3f}"


if __name__ == "__main__":
    main()
