"""The checker beside the oracle, in numbers: `python benchmarks/mutants.py --mutants 2000`.

Mutates random small plans and compares both verdicts; prints them for each kind of mutation, what
was wrong with those refused, how far the checker's memory bound is above the exact peak, and how
long it took.
"""

import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from comparison import Comparison, compare, mutants

Counts = defaultdict[str, Counter[str]]


@click.command()
@click.option("--mutants", "num_mutants", type=click.IntRange(min=1), default=2000)
@click.option("--seed", type=int, default=0)
@click.option("--show", type=click.IntRange(min=0), default=5, help="Disagreements to print.")
def main(num_mutants: int, seed: int, show: int) -> None:
    """Print verdicts by kind of mutation, slack and seconds; fail if any verdicts disagree."""
    console, counts = Console(), Counts(Counter)
    slack: list[int] = []
    peaks: list[int] = []
    start = time.perf_counter()
    num_disagreements = num_partly = 0
    faults: Counter[str] = Counter()
    alone: Counter[int] = Counter()
    for number, (kinds, mutant) in enumerate(mutants(num_mutants, seed)):
        found = compare(mutant)
        counts[kinds if " + " not in kinds else "two at once"][_verdict(found)] += 1
        num_partly += not found.oracle.complete
        faults.update(found.oracle.kinds)
        if len(found.reasons) == 1:
            alone.update(found.reasons.keys())
        if not found.agrees or min(found.slack_bytes if found.bound_bytes else (0,)) < 0:
            num_disagreements += 1
            if num_disagreements <= show:
                console.print(f"mutant {number}, {kinds}", markup=False)
                console.print(found.explain(), markup=False, highlight=False)
        elif found.bound_bytes:
            slack += found.slack_bytes
            peaks += found.oracle.peak_bytes
    console.print(_table(counts))
    seconds = time.perf_counter() - start
    console.print(f"{num_mutants} mutants of seed {seed} in {seconds:.1f} s")
    console.print(f"faults found by the oracle: {dict(faults.most_common())}")
    console.print(f"refused by one rule alone: {dict(sorted(alone.items()))}")
    console.print(f"{num_partly} explored by random walks in part")
    if slack:
        mean = sum(slack) / len(slack)
        console.print(
            f"memory bound above the exact peak: mean {mean:.3f} bytes, largest {max(slack)} "
            f"(mean peak {sum(peaks) / len(peaks):.1f} bytes)"
        )
    if num_disagreements:
        raise SystemExit(f"{num_disagreements} disagreements")


def _verdict(found: Comparison) -> str:
    if found.oracle.faults:
        return "harmful, accepted" if found.accepted else "harmful, refused"
    return "harmless, accepted" if found.accepted else "harmless, refused"


def _table(counts: Counts) -> Table:
    verdicts = ("harmful, refused", "harmless, accepted", "harmful, accepted", "harmless, refused")
    table = Table(title="verdicts: oracle, checker")
    table.add_column("mutation")
    for verdict in verdicts:
        table.add_column(verdict, justify="right")
    total: Counter[str] = Counter()
    for kind, found in sorted(counts.items()):
        total.update(found)
        table.add_row(kind, *(str(found[verdict]) for verdict in verdicts))
    table.add_row("all", *(str(total[verdict]) for verdict in verdicts))
    return table


if __name__ == "__main__":
    main()
