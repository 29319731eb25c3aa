"""The compute steps of one rank, and when each of its stages and units is used last."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.plan.types import Unit
from planner.schedule import ComputeStep

__all__ = ["RankWork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """What the passes over one rank have in common."""

    steps: Sequence[ComputeStep]
    units_of: Sequence[Sequence[Unit]]
    """Units by stage, of all ranks."""
    units: tuple[Unit, ...]
    """Of this rank, in the order of their first stages here."""
    last_uses: dict[str, int]
    """Unit -> its last step."""
    stage_ends: tuple[int, ...]
    """The last step of each stage, ascending."""

    @classmethod
    def of(cls, steps: Sequence[ComputeStep], units_of: Sequence[Sequence[Unit]]) -> "RankWork":
        ends = {step.stage: index for index, step in enumerate(steps)}
        units = {unit.name: unit for stage in sorted(ends) for unit in units_of[stage]}
        last_uses = dict.fromkeys(units, -1)
        for stage, end in ends.items():
            for unit in units_of[stage]:
                last_uses[unit.name] = max(end, last_uses[unit.name])
        return cls(
            steps=steps,
            units_of=units_of,
            units=tuple(units.values()),
            last_uses=last_uses,
            stage_ends=tuple(sorted(ends.values())),
        )
