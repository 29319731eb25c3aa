"""The part of a cluster file that says how it was measured, validated with pydantic.

Knows keys, types and ranges. Nothing of it is needed to plan.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MeasuredSpec", "OverlapSpec", "SampleSpec", "Strict", "Where"]

Where = Literal["inside", "between"]
"""Inside one host, or between hosts."""


class Strict(BaseModel):
    """Refuses unknown keys, strings for numbers, and infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SampleSpec(Strict):
    """Seconds of one operation, as they were measured."""

    operation: Annotated[str, Field(min_length=1)]
    """`send`, `exchange` (both directions at once), `crowd` (exchanges of all ranks at once),
    `gather`, `reduce-scatter`, `all-reduce`."""
    where: Where
    ranks: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    """Of a message; of a collective: the whole vector, all parts together."""
    seconds: Annotated[float, Field(ge=0)]
    """Median."""
    spread: Annotated[float, Field(ge=0)] = 0.0
    """Half the distance between the quartiles, as a part of the median."""


class OverlapSpec(Strict):
    """One operation beside a computation of about the same length."""

    operation: Annotated[str, Field(min_length=1)]
    where: Where
    ranks: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    hidden: Annotated[float, Field(ge=0, le=1)]
    """Part of the operation's own time that does not lengthen the computation."""
    slowdown: Annotated[float, Field(ge=0)]
    """By how much the computation is slower meanwhile, as a part of its own time."""


class MeasuredSpec(Strict):
    """How a cluster file was measured: nothing of it is needed to plan."""

    date: str
    command: str
    versions: dict[str, str]
    notes: list[str] = []
    samples: list[SampleSpec] = []
    overlaps: list[OverlapSpec] = []
