"""Micro-batch sizes that a model can be traced with.

Some models refuse some sizes: BatchNorm, for one, wants more than one value per channel. Such a
size is no choice, but neither is it the end of the search, unless the user demanded it.
This module knows which sizes fail and why. It does not know choices' costs.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.errors import TraceError
from planner.graph import LayerGraph
from planner.solve.choices import Choice, divisors
from planner.solve.entry import Clock
from planner.solve.problem import Problem
from planner.solve.types import Candidate

__all__ = ["Sizes", "in_order"]


def in_order(sizes: Iterable[int]) -> list[int]:
    """Those worth tracing first: of one sample, torch lays out some tensors in its own ways."""
    return sorted(sizes, key=lambda size: (size == 1, size))


@dataclass(slots=True, kw_only=True)
class Sizes:
    """Traces and profiles each size once, and remembers the failures."""

    problem: Problem
    clock: Clock
    """Does not count what tracing and profiling take: a large model needs seconds for each size."""
    failures: dict[int, TraceError | None] = field(default_factory=dict)
    """By size; None where it can be traced."""

    def accepts(self, size: int) -> bool:
        """Whether the model can be traced and profiled with this size.

        Raises TraceError if it cannot and the user demanded this size.
        """
        if size not in self.failures:
            started = self.clock.spent
            self.failures[size] = self._failure(size)
            self.clock.exclude(self.clock.spent - started)
        return self.failures[size] is None

    def _failure(self, size: int) -> TraceError | None:
        try:
            self.problem.graph_at(size)
            self.problem.profile_at(size)
        except TraceError as error:
            if self.problem.constraints.micro_batch_size is not None:
                raise
            return error
        return None

    def any_graph(self) -> LayerGraph:
        """The model at the demanded size, or else at the smallest one that any mesh could use.

        Raises TraceError if no size can be traced.
        """
        demanded = self.problem.constraints.micro_batch_size
        if demanded is not None:
            return self.problem.graph_at(demanded)
        for size in in_order(divisors(self.problem.global_batch_size)) or [1]:
            if self.accepts(size):
                return self.problem.graph_at(size)
        self.raise_if_all_refused()
        raise AssertionError

    def raise_if_all_refused(self) -> None:
        """Raises the smallest size's TraceError if no size tried can be traced."""
        errors = [error for _, error in sorted(self.failures.items()) if error is not None]
        if errors and len(errors) == len(self.failures):
            raise errors[0]

    def candidate(self, choice: Choice) -> Candidate:
        """What became of a choice of a refused size."""
        error = self.failures[choice.micro_batch_size]
        assert error is not None
        return Candidate(
            **dataclasses.asdict(choice),
            verdict=f"infeasible: the model cannot be traced with micro-batches of "
            f"{choice.micro_batch_size}: {error.message}",
            bound_seconds=math.inf,
        )
