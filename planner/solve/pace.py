"""The step-time model: the longest path through the stages, for numbers and for CP-SAT alike.

Every quantity is either a number of ticks or a linear expression of CP-SAT, and the only operation
besides addition is `latest`, so that one text serves to evaluate a split and to search for one.

A rank works through its stages in the layered order: all micro-batches of a stage, then its next
stage. So a path through the step either follows one micro-batch from stage to stage, or waits in
one stage for all the others; between two restarts of a rank it does the latter once, in the
longest stage on its way. Two moments per stage are therefore enough: when its first micro-batch is
done (`opened`) and when its last is (`closed`). For layers of known cost and links that are never
shared, the result is the makespan of the layered order, not an estimate of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Pace", "StageTicks", "step_time"]

Ticks = Any
"""A number of ticks, or a linear expression whose value is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTicks:
    """What one stage takes."""

    forward: Ticks
    """One micro-batch."""
    rebuild: Ticks
    """One micro-batch forward again before its backward; it need not wait for gradients."""
    backward: Ticks
    """One micro-batch."""
    arrival: Ticks
    """To receive a micro-batch from the stage before (0 for the first stage)."""
    gradient_arrival: Ticks
    """For the stage before to receive the gradients back."""
    gather: Ticks
    reduce: Ticks
    update: Ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Counts that shape the paths."""

    num_ranks: int
    num_micro_batches: int
    gathers: bool
    """The weights are gathered before use (partition 3)."""
    reduces: bool
    """The gradients are reduced over replicas."""
    num_weight_buffers: int


def step_time(stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks]) -> Ticks:
    """Ticks from the start of the step to the last rank's last update."""
    closed = _forward(stages, pace, latest)
    return _backward(stages, pace, latest, closed)


def _forward(stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks]) -> list[Ticks]:
    """When each stage has run forward for all micro-batches."""
    opened: list[Ticks] = []
    closed: list[Ticks] = []
    gathered: list[Ticks] = []
    for index, stage in enumerate(stages):
        own_previous, reused = (
            index - pace.num_ranks,
            index - pace.num_ranks * pace.num_weight_buffers,
        )
        ready: list[Ticks] = [0]
        if pace.gathers:
            # Gathers queue on the rank's data stream, and each waits for a buffer to come free.
            before = [gathered[own_previous]] if own_previous >= 0 else [0]
            before += [closed[reused]] if reused >= 0 else []
            gathered.append(latest(*before) + stage.gather)
            ready.append(gathered[index])
        if own_previous >= 0:
            ready.append(closed[own_previous])
        if index > 0:
            ready.append(opened[index - 1] + stage.arrival)
        opened.append(latest(*ready) + stage.forward)
        done = [opened[index] + (pace.num_micro_batches - 1) * stage.forward]
        if index > 0:
            done.append(closed[index - 1] + stage.arrival + stage.forward)
        closed.append(latest(*done))
    return closed


def _backward(
    stages: Sequence[StageTicks],
    pace: Pace,
    latest: Callable[..., Ticks],
    forward_closed: list[Ticks],
) -> Ticks:
    """When the last rank has done its last update."""
    num_stages, ranks = len(stages), pace.num_ranks
    opened: dict[int, Ticks] = {}
    closed: dict[int, Ticks] = {}
    regathered: dict[int, Ticks] = {}
    reduced: dict[int, Ticks] = {}
    free: dict[int, Ticks] = {}
    for index in reversed(range(num_stages)):
        stage, own_previous = stages[index], index + ranks
        ready = [free[own_previous]] if own_previous < num_stages else [forward_closed[index]]
        if index in regathered:
            ready.append(regathered[index])
        rebuilt = [latest(*ready) + stage.rebuild]
        if index + 1 < num_stages:
            rebuilt.append(opened[index + 1] + stages[index + 1].gradient_arrival)
        opened[index] = latest(*rebuilt) + stage.backward
        turn = stage.rebuild + stage.backward
        done = [opened[index] + (pace.num_micro_batches - 1) * turn]
        if index + 1 < num_stages:
            done.append(closed[index + 1] + stages[index + 1].gradient_arrival + stage.backward)
        closed[index] = latest(*done)
        if not pace.reduces:
            free[index] = closed[index] + stage.update
            continue
        # The data stream: gather the weights of a stage to come, then reduce this one's gradients.
        moved = closed[index]
        if own_previous < num_stages:
            moved = latest(moved, reduced[own_previous])
        following = index - ranks * pace.num_weight_buffers
        if pace.gathers and following >= 0:
            moved = moved + stages[following].gather
            regathered[following] = moved
        reduced[index] = moved + stage.reduce
        # The stage before is updated only now, so that its reduction hides behind this one.
        free[index] = closed[index]
        if own_previous < num_stages:
            free[index] = latest(closed[index], reduced[own_previous]) + stages[own_previous].update
    first = range(ranks)
    if not pace.reduces:
        return latest(*(free[index] for index in first))
    return latest(*(latest(free[index], reduced[index]) + stages[index].update for index in first))
