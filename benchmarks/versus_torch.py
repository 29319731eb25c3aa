"""Ours against what a user would pick: torch's pipelining, FSDP2 and DDP, in one run.

`python benchmarks/versus_torch.py --ranks 2` starts that many gloo processes, which stay alive and
train the same GPT on the same batch and micro-batches with every contender in turns. Each of
torch's ways is weighed first. Ours is then the plan of the very same order, or, where that takes
more memory than torch did, the plan that the solver makes for the same mesh within it. Gradients
are compared with one process. Ratios are taken within each round, so that what else the machine
does cancels. Exits with 1 where a gradient differs, or where ours takes longer beyond the noise, or
more memory.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.table import Table
from versus_torch_model import Sizes
from versus_torch_ours import Contest, contests, plan_within, prepared_for
from versus_torch_ranks import Entry, Measured, measure

from planner.cluster import resolve_cluster
from planner.console import HELP, console
from planner.files import write_text
from planner.plan.types import Plan
from planner.prepare import Prepared

TOLERANCE = 1e-6
"""Of gradients: fp32 sums in other orders, over the largest of a parameter."""
MEMORY_TOLERANCE = 1.001
"""Scalars and the like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Ours against one of torch's ways."""

    theirs: Measured
    ours: Measured

    @property
    def time_ratios(self) -> list[float]:
        """Ours over theirs in each round, ascending."""
        pairs = zip(self.ours.seconds, self.theirs.seconds, strict=True)
        return sorted(mine / other for mine, other in pairs)

    @property
    def cpu_ratio(self) -> float:
        """Median of ours over theirs, over all ranks' threads."""
        pairs = zip(self.ours.cpu_seconds, self.theirs.cpu_seconds, strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    @property
    def time_interval(self) -> tuple[float, float]:
        """Where the median ratio lies, with 95 % confidence (from the sign test)."""
        return median_interval(self.time_ratios)

    @property
    def memory_ratio(self) -> float:
        """Of the fullest ranks."""
        return max(self.ours.peak_bytes) / max(self.theirs.peak_bytes)

    @property
    def is_slower(self) -> bool:
        return self.time_interval[0] > 1.0

    @property
    def takes_more(self) -> bool:
        return self.memory_ratio > MEMORY_TOLERANCE


def median_interval(ascending: list[float]) -> tuple[float, float]:
    """The innermost pair of order statistics that encloses the median in 95 % of samples."""
    number, outside, rank = len(ascending), 0.0, 0
    while rank < number // 2:
        outside += 2 * math.comb(number, rank) / 2**number
        if outside > 0.05:
            break
        rank += 1
    lowest = max(rank - 1, 0)
    return ascending[lowest], ascending[number - 1 - lowest]


@click.command(context_settings=HELP)
@click.option("--ranks", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=11, show_default=True)
@click.option("--only", multiple=True, help="Only torch's ways whose name begins so.")
@click.option("--blocks", default=Sizes().num_blocks, show_default=True)
@click.option("--width", default=Sizes().width, show_default=True)
@click.option("--context", default=Sizes().context, show_default=True, help="Tokens in a sample.")
@click.option("--batch-size", default=Sizes().global_batch_size, show_default=True)
@click.option("--micro-batch-size", default=Sizes().micro_batch_size, show_default=True)
@click.option("--fused", is_flag=True, help="AdamW in one kernel, for all.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write every figure here.")
def main(
    ranks: int, rounds: int, only: tuple[str, ...], blocks: int, width: int, context: int,
    batch_size: int, micro_batch_size: int, fused: bool, path: Path | None,
) -> None:  # fmt: skip
    """Time and weigh ours against torch's own ways on this machine."""
    sizes = Sizes(
        num_blocks=blocks, width=width, context=context, global_batch_size=batch_size,
        micro_batch_size=micro_batch_size, is_fused=fused,
    )  # fmt: skip
    wanted = [c for c in contests(sizes, ranks) if c.name.startswith(only or ("",))]
    if not wanted:
        raise click.UsageError(f"no contender's name begins with {' or '.join(only)}")
    prepared = prepared_for(sizes, resolve_cluster("cpu", ranks), ranks)
    found = compared(sizes, wanted, prepared, rounds)
    console.print(table(found))
    failed = [problem for verdict in found for problem in problems(verdict)]
    for problem in dict.fromkeys(failed):
        console.print(problem)
    if path is not None:
        measured = {m.name: asdict(m) for v in found for m in (v.theirs, v.ours)}
        write_text(path, json.dumps(measured, indent=1))
    raise SystemExit(1 if failed else 0)


def compared(
    sizes: Sizes, wanted: list[Contest], prepared: Prepared, num_rounds: int
) -> list[Verdict]:
    """Weigh theirs, plan within that, run all and pair."""
    num_ranks = prepared.problem.num_devices
    theirs = [Entry(name=c.name, theirs=c.theirs, boundaries=c.boundaries) for c in wanted]
    weighed = measure(sizes, theirs, num_ranks, 0)
    entries = list(theirs)
    for contest, other in zip(wanted, weighed, strict=True):
        plan = plan_within(prepared, contest.placement, max(other.peak_bytes))
        console.print(f"{name_of_ours(contest)}: {described(plan)}", markup=False)
        entries.append(Entry(name=name_of_ours(contest), plan=plan))
    found = {m.name: m for m in measure(sizes, entries, num_ranks, num_rounds)}
    return [Verdict(theirs=found[c.name], ours=found[name_of_ours(c)]) for c in wanted]


def name_of_ours(contest: Contest) -> str:
    """Name of our plan against one of torch's ways."""
    return f"ours: {contest.name}"


def described(plan: Plan) -> str:
    """What a plan decides, in words."""
    recomputed = sum(stage.recompute for stage in plan.stages)
    return (
        f"{plan.num_replicas} x {plan.num_pipeline_ranks} ranks, {plan.num_stages} stages "
        f"({recomputed} recomputed), {plan.num_micro_batches} micro-batches of "
        f"{plan.micro_batch_size}, partition {plan.partition}, {plan.schedule.value}"
    )


def problems(verdict: Verdict) -> list[str]:
    """What does not hold, in words."""
    found = [
        f"{side.name}: gradients differ by {side.difference:.1e}"
        for side in (verdict.theirs, verdict.ours)
        if not side.difference <= TOLERANCE
    ]
    if verdict.is_slower:
        found.append(f"{verdict.ours.name} is slower than {verdict.theirs.name}")
    if verdict.takes_more:
        found.append(f"{verdict.ours.name} takes more memory than {verdict.theirs.name}")
    return found


def table(verdicts: list[Verdict]) -> Table:
    """A row per pair; `time`, `CPU` and `memory` are ours over theirs."""
    title = "ours against theirs: median step of the slowest rank, peak of the fullest"
    found = Table(title=title, title_justify="left")
    for head in ("theirs", "ms", "ours ms", "time", "95 %", "CPU", "MiB", "ours MiB", "memory",
                 "gradients"):  # fmt: skip
        found.add_column(head, justify="left" if head == "theirs" else "right", no_wrap=True)
    for verdict in verdicts:
        theirs, ours = verdict.theirs, verdict.ours
        low, high = verdict.time_interval
        ratio = statistics.median(verdict.time_ratios)
        found.add_row(
            theirs.name,
            *(f"{statistics.median(side.seconds) * 1e3:.1f}" for side in (theirs, ours)),
            f"[{'red' if verdict.is_slower else 'green'}]{ratio:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{verdict.cpu_ratio:.3f}",
            *(f"{max(side.peak_bytes) / 2**20:.1f}" for side in (theirs, ours)),
            f"[{'red' if verdict.takes_more else 'default'}]{verdict.memory_ratio:.3f}",
            f"{max(theirs.difference, ours.difference):.0e}",
        )
    return found


if __name__ == "__main__":
    main()
