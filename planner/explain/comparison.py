"""Two plans of one model, side by side.

This module knows what differs between plans: placement, time and memory. Both are simulated, each
on the cluster that it was made for.
"""

from dataclasses import dataclass

from planner.errors import FingerprintError
from planner.explain.shares import Shares, mean_shares, rank_shares
from planner.plan.types import Plan
from planner.simulate import Simulation, simulate

__all__ = ["Comparison", "Side", "check_same_model", "compare_plans", "side_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A plan and what its step is made of."""

    plan: Plan
    simulation: Simulation
    shares: Shares
    """Means over pipeline ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A new plan beside an existing one."""

    new: Side
    existing: Side
    moved_layers: tuple[str, ...]
    """Layers on another pipeline rank, or in another stage of it, than in the existing plan."""

    @property
    def ratio(self) -> float:
        """The new plan's step over the existing one's."""
        before = self.existing.simulation.step_seconds
        return self.new.simulation.step_seconds / before if before else 1.0


def compare_plans(new: Plan, simulation: Simulation, existing: Plan) -> Comparison:
    """Compare a plan and its simulation with another plan of the same model.

    Raises:
        FingerprintError: the other plan is of another model.
    """
    check_same_model(existing, new.model_name, new.fingerprint)
    return Comparison(
        new=side_of(new, simulation),
        existing=side_of(existing, simulate(existing)),
        moved_layers=tuple(
            name
            for name in new.layer_names
            if _places(new).get(name) != _places(existing).get(name)
        ),
    )


def check_same_model(existing: Plan, model_name: str, fingerprint: str) -> None:
    """Refuse a plan of another model.

    Raises:
        FingerprintError: its fingerprint is another.
    """
    if existing.fingerprint != fingerprint:
        raise FingerprintError(
            f"the plan to compare with is of {existing.model_name} ({existing.fingerprint[:12]}), "
            f"the new one of {model_name} ({fingerprint[:12]})",
            hint="compare plans of one model: the same parameters, shapes and layers",
        )


def side_of(plan: Plan, simulation: Simulation) -> Side:
    return Side(plan=plan, simulation=simulation, shares=mean_shares(rank_shares(plan, simulation)))


def _places(plan: Plan) -> dict[str, tuple[int, int]]:
    """Stage and pipeline rank of each layer."""
    return {layer: (stage.index, stage.rank) for stage in plan.stages for layer in stage.layers}
