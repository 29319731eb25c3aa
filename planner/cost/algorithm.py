"""Which algorithm of collectives explains measured seconds best, and how far it is from them.

Knows the formulas of `planner.cost.collectives`. Does not know how anything was measured.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cluster.samples import SampleSpec
from planner.cluster.schema import ClusterFile, LinkSpec
from planner.cluster.types import CollectiveAlgorithm, Link
from planner.cost.collectives import all_reduce_seconds, gather_seconds, reduce_scatter_seconds

__all__ = [
    "MeasuredCollective",
    "measured_collectives",
    "nearest_algorithm",
    "predicted_seconds",
    "with_algorithm",
]

_FORMULAS = {
    "gather": gather_seconds,
    "reduce-scatter": reduce_scatter_seconds,
    "all-reduce": all_reduce_seconds,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCollective:
    """One collective of one size."""

    operation: str
    """`gather`, `reduce-scatter` or `all-reduce`."""
    num_bytes: int
    """The whole vector."""
    num_members: int
    link: Link
    """The slowest that it passes."""
    seconds: float


def predicted_seconds(measured: MeasuredCollective, algorithm: CollectiveAlgorithm) -> float:
    """What the formula of the operation says for the same bytes, members and link."""
    formula = _FORMULAS[measured.operation]
    return formula(measured.num_bytes, measured.num_members, measured.link, algorithm)


def nearest_algorithm(
    collectives: Sequence[MeasuredCollective],
) -> tuple[CollectiveAlgorithm, float]:
    """The algorithm whose predictions are nearest, and measured over predicted in the median.

    Nearest: least mean of |log(predicted / measured)|, so that twice too long is as bad as half.
    Of equals the first of ring, tree. Ring and 1.0 where there is nothing to compare.
    """
    known = [c for c in collectives if c.num_members > 1 and c.seconds > 0]
    if not known:
        return "ring", 1.0

    def distance(algorithm: CollectiveAlgorithm) -> float:
        return statistics.fmean(
            abs(math.log(predicted_seconds(c, algorithm) / c.seconds)) for c in known
        )

    algorithms: tuple[CollectiveAlgorithm, ...] = ("ring", "tree")
    best = min(algorithms, key=distance)
    ratios = [c.seconds / predicted_seconds(c, best) for c in known]
    return best, statistics.median(ratios)


def measured_collectives(file: ClusterFile) -> list[MeasuredCollective]:
    """The collectives among the samples of a measured cluster file, with the links they passed."""
    samples = [] if file.measured is None else file.measured.samples
    found = []
    for sample in samples:
        link = _link(file, sample)
        if sample.operation in _FORMULAS and link is not None:
            found.append(
                MeasuredCollective(
                    operation=sample.operation,
                    num_bytes=sample.bytes,
                    num_members=sample.ranks,
                    link=link,
                    seconds=sample.seconds,
                )
            )
    return found


def with_algorithm(file: ClusterFile) -> ClusterFile:
    """The same file with the algorithm that its samples are nearest to, and a note on how near."""
    collectives = measured_collectives(file)
    if not collectives or file.measured is None:
        return file
    algorithm, ratio = nearest_algorithm(collectives)
    note = (
        f"collectives: {algorithm} is nearest; they take {ratio:.2g} times what it predicts from "
        f"the links, in the median"
    )
    measured = file.measured.model_copy(update={"notes": [*file.measured.notes, note]})
    return file.model_copy(update={"collectives": algorithm, "measured": measured})


def _link(file: ClusterFile, sample: SampleSpec) -> Link | None:
    spec = file.network if sample.where == "between" else file.hosts[0].link
    return spec.to_link() if isinstance(spec, LinkSpec) else None
