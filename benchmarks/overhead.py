"""What a runtime adds to each instruction: `python benchmarks/overhead.py`.

Ours and torch.distributed.pipelining run the same schedules of one tiny model, in processes on this
machine over gloo, and take turns with the same kernels and messages written out in a line. What a
step takes beyond that line is divided by the computes of the step (the same in both), and by the
actions as each counts its own. Time is CPU time of all threads that Python runs: neither waiting
nor other programs count, nor gloo's own threads, which carry messages. A step has its optimizer.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from overhead_rank import CONTESTANTS, NUM_LAYERS, model_of_width
from rich.console import Console
from rich.table import Table

from planner.export.skeleton import ideal_cluster
from planner.lower import lower
from planner.measure import measure
from planner.plan.file import write_plan
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.solve.types import Placement
from planner.trace import trace
from runtime.launch import run_ranks

PAIRS = (
    (Schedule.LAYERED, "ScheduleLoopedBFS"),
    (Schedule.INTERLEAVED, "ScheduleInterleaved1F1B"),
    (Schedule.GPIPE, "ScheduleGPipe"),
    (Schedule.ONE_F_ONE_B, "Schedule1F1B"),
)
"""Our schedule, and torch's class of the same order of compute."""
_LOOPING = (Schedule.LAYERED, Schedule.INTERLEAVED)
"""With a stage for every layer; the others have one stage per rank."""
_COMPUTES = (Opcode.FORWARD, Opcode.BACKWARD)
_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """CPU seconds beyond what is written out, over all ranks and steps of one round."""

    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torch


@click.command()
@click.option("--ranks", type=click.IntRange(min=1), multiple=True, default=(1, 2, 4))
@click.option("--micro-batches", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True)
def main(ranks: tuple[int, ...], micro_batches: int, width: int, rounds: int, steps: int) -> None:
    """Print a row per number of ranks and schedule.

    Each round takes `--steps` steps of each kind. Figures are medians over rounds; of the ratios
    the quartiles too.
    """
    table = Table(
        title=f"{NUM_LAYERS} linear layers of width {width}, {micro_batches} micro-batches: "
        "CPU time beyond kernels and messages"
    )
    columns = (
        "ranks", "ours", "torch", "by hand", "us per compute", "ratio", "us per action", "ratio"
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("ours", "torch") else "right")
    for num_ranks in ranks:
        plans, found = _measured(num_ranks, micro_batches, width, rounds, steps)
        for case, (schedule, name) in enumerate(_pairs(num_ranks)):
            row = _row(plans[case], [figures[case] for figures in found])
            table.add_row(str(num_ranks), schedule.value, name, *row)
    Console().print(table)


def _pairs(num_ranks: int) -> Sequence[tuple[Schedule, str]]:
    """On one rank all others come down to gradient accumulation in one stage."""
    return PAIRS if num_ranks > 1 else PAIRS[:1]


def _measured(
    num_ranks: int, num_micro_batches: int, width: int, num_rounds: int, num_steps: int
) -> tuple[list[Plan], list[list[dict[str, Any]]]]:
    """The plans of the cases, and by rank and case what its processes found."""
    pairs = _pairs(num_ranks)
    plans = [_plan(schedule, num_ranks, num_micro_batches, width) for schedule, _ in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schedules").write_text(json.dumps([torch_name for _, torch_name in pairs]))
        for case, plan in enumerate(plans):
            write_plan(plan, folder / f"{case}.plan.yaml")
        script = str(Path(__file__).with_name("overhead_rank.py"))
        numbers = [str(number) for number in (width, num_rounds, num_steps)]
        exit_code = run_ranks([script, name, *numbers], plans[0].grid)
        if exit_code:
            sys.exit(exit_code)
        found = [json.loads((folder / f"figures.{rank}").read_text()) for rank in range(num_ranks)]
    return plans, found


def _plan(schedule: Schedule, num_ranks: int, num_micro_batches: int, width: int) -> Plan:
    num_stages = NUM_LAYERS if schedule in _LOOPING else num_ranks
    traced = trace(model_of_width(width))
    placement = Placement(
        num_replicas=1,
        num_pipeline_ranks=num_ranks,
        boundaries=tuple(range(0, NUM_LAYERS + 1, NUM_LAYERS // num_stages)),
        stage_ranks=tuple(stage % num_ranks for stage in range(num_stages)),
        micro_batch_size=1,
        num_micro_batches=num_micro_batches,
        partition=0,
        recompute=(False,) * num_stages,
        schedule=schedule,
    )
    return lower(
        traced.layer_graph(1), measure(traced, 1), ideal_cluster(num_ranks), placement,
        PlanOptions(),
    )  # fmt: skip


def _row(plan: Plan, figures: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of one case from what its ranks found."""
    num_computes = sum(i.opcode in _COMPUTES for program in plan.programs for i in program)
    num_actions = {
        name: sum(of_rank["num_actions"][name] for of_rank in figures) for name in CONTESTANTS
    }
    excesses = _excesses(figures)
    by_hand = statistics.median(_sums(figures, "by hand")) / num_computes
    mine = statistics.median(e.ours for e in excesses)
    theirs = statistics.median(e.torch for e in excesses)
    scale = num_actions["torch"] / num_actions["ours"]
    return [
        f"{_microseconds(by_hand)}",
        f"{_microseconds(mine / num_computes)} : {_microseconds(theirs / num_computes)}",
        _spread([e.ratio for e in excesses]),
        f"{_microseconds(mine / num_actions['ours'])} : "
        f"{_microseconds(theirs / num_actions['torch'])}",
        _spread([e.ratio * scale for e in excesses]),
    ]


def _excesses(figures: Sequence[dict[str, Any]]) -> list[Excess]:
    """By round."""
    sums = {name: _sums(figures, name) for name in CONTESTANTS}
    return [
        Excess(ours=mine - bare, torch=theirs - bare)
        for mine, theirs, bare in zip(*(sums[name] for name in CONTESTANTS), strict=True)
    ]


def _sums(figures: Sequence[dict[str, Any]], name: str) -> list[float]:
    """By round: seconds of a step, summed over ranks."""
    of_ranks = [of_rank["seconds"][name] for of_rank in figures]
    return [sum(seconds) for seconds in zip(*of_ranks, strict=True)]


def _spread(ratios: Sequence[float]) -> str:
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _microseconds(seconds: float) -> str:
    return f"{seconds * _MICROSECONDS:.1f}"


if __name__ == "__main__":
    main()
