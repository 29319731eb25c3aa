"""Why a plan takes as long as it does, and why others would take longer.

Puts the parts together: what bounds the step, what more of something would buy, and what became of
the best plan of each family. Everything is solved or simulated; nothing is guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.explain.changes import ClusterAt, offers
from planner.explain.families import FAMILIES, Family, FamilyResult, best_of_family, contains
from planner.explain.shares import Bottleneck, Shares, find_bottleneck, mean_shares, rank_shares
from planner.explain.types import (
    Planned,
    PlannerFor,
    Resolved,
    Tell,
    limits_of,
    simulator,
    tell_nobody,
)
from planner.plan.types import Plan
from planner.simulate import Simulation
from planner.solve import Placement, Problem

__all__ = ["Explanation", "Loss", "Verdict", "compare_families", "explain"]

_EQUAL = 1e-6
"""Relative difference below which two steps take the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A part of the step that takes longer, or shorter, than in the plan."""

    part: str
    """As `Shares.parts` names it."""
    more_seconds: float
    """Mean over pipeline ranks, negative where it takes less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The best plan of a family beside the plan."""

    result: FamilyResult
    is_plan: bool
    """The plan is the family's best."""
    ratio: float | None
    """Its step over the plan's."""
    losses: tuple[Loss, ...]
    """Where the difference comes from, the largest first; they add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All there is to say about a plan."""

    bottleneck: Bottleneck
    offers: tuple[Resolved, ...]
    """What more of one thing would buy."""
    verdicts: tuple[Verdict, ...]
    """Of the families, in their order."""

    @property
    def better(self) -> Verdict | None:
        """The best family that is faster than the plan, if any."""
        faster = [v for v in self.verdicts if v.ratio is not None and v.ratio < 1 - _EQUAL]
        return min(faster, key=lambda verdict: verdict.ratio or 0.0, default=None)


def explain(
    problem: Problem,
    planner_for: PlannerFor,
    placement: Placement,
    made: tuple[Plan, Simulation],
    *,
    cluster_at: ClusterAt | None = None,
    time_limit_seconds: float = 3.0,
    tell: Tell = tell_nobody,
) -> Explanation:
    """Explain the placement that solves a problem, and the plan that was made of it.

    `time_limit_seconds` is for each of the problems that are solved on the way, about twenty.
    """
    return Explanation(
        bottleneck=find_bottleneck(*made, limits_of(problem, placement)),
        offers=offers(
            problem,
            planner_for,
            placement,
            cluster_at=cluster_at,
            time_limit_seconds=time_limit_seconds,
            tell=tell,
        ),
        verdicts=compare_families(
            problem,
            planner_for(problem),
            placement,
            made,
            time_limit_seconds=time_limit_seconds,
            tell=tell,
        ),
    )


def compare_families(
    problem: Problem,
    planned: Planned,
    placement: Placement,
    made: tuple[Plan, Simulation],
    *,
    families: Sequence[Family] = FAMILIES,
    time_limit_seconds: float = 3.0,
    tell: Tell = tell_nobody,
) -> tuple[Verdict, ...]:
    """The best plan of each family beside a placement and the plan that was made of it.

    A family that the placement belongs to has it for its best: the solver has looked at them all.
    """
    own, seconds = mean_shares(rank_shares(*made)), made[1].step_seconds
    simulate = simulator(planned)
    found = []
    for family in families:
        tell(f"the best plan of family: {family.name}")
        if contains(family, placement):
            result = FamilyResult(family=family, placement=placement, step_seconds=seconds)
        else:
            result = best_of_family(
                problem, simulate, family, time_limit_seconds=time_limit_seconds
            )
        if result.placement is None or result.step_seconds is None:
            found.append(Verdict(result=result, is_plan=False, ratio=None, losses=()))
            continue
        is_plan = result.placement == placement
        other = own if is_plan else mean_shares(rank_shares(*planned(result.placement)))
        found.append(
            Verdict(
                result=result,
                is_plan=is_plan,
                ratio=result.step_seconds / seconds,
                losses=_losses(own, other),
            )
        )
    return tuple(found)


def _losses(own: Shares, other: Shares) -> tuple[Loss, ...]:
    """By part, the largest first. One part for forward and backward, which differ together."""
    ours, theirs = _merged(own), _merged(other)
    names = dict.fromkeys((*ours, *theirs))
    losses = [
        Loss(part=name, more_seconds=theirs.get(name, 0.0) - ours.get(name, 0.0)) for name in names
    ]
    return tuple(sorted(losses, key=lambda loss: -loss.more_seconds))


def _merged(shares: Shares) -> dict[str, float]:
    merged: dict[str, float] = {}
    for name, seconds in shares.parts().items():
        part = "compute" if name in ("forward", "backward", "other") else name
        merged[part] = merged.get(part, 0.0) + seconds
    return merged
