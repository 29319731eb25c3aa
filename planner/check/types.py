"""What the checker says: one verdict per rule."""

from dataclasses import dataclass

__all__ = ["Cell", "Failure", "Report", "Verdict"]

Cell = tuple[int, int]
"""(pipeline rank, index in its program)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Where and how a plan breaks a rule."""

    message: str
    cells: tuple[Cell, ...] = ()
    """The instructions concerned, the one to blame first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One rule, proved or broken."""

    number: int
    title: str
    passed: bool
    counterexample: str = ""
    """What breaks the rule, and the programs around it with the instruction marked."""
    note: str = ""
    """What was compared, or why there was nothing to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The verdicts on a plan, by rule number."""

    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def failures(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)
