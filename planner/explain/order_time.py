"""How long an order's compute takes, for many splits at once, without lowering or simulating any.

The longest path through the compute steps: each waits for the step before it on its rank, and for
the tensors that it reads to come over the link, which carries one message at a time. Before it the
weights are gathered once, behind it the gradients are reduced and the last of them updated. What
else a step moves is not counted, so the simulator is still asked of the splits that look best. This
module knows time. It does not know memory.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from planner.plan.types import Opcode
from planner.schedule import Order, order_of
from planner.solve import Placement
from planner.solve.instance import Cuts, Flags, Instance, latest_of_many, stages_of_many
from planner.solve.step_parts import Pace, StageTicks, Ticks

__all__ = ["OrderTime", "Step", "steps_of"]


class Step(NamedTuple):
    """One compute step, behind those that it waits for."""

    rank: int
    stage: int
    column: int
    """Which of a stage's durations it takes."""
    source: int
    """Position of the step that makes what it reads; -1 where that is not on another stage."""


_FORWARD, _AGAIN, _BACKWARD, _HALF = range(4)
_COLUMNS = {
    Opcode.FORWARD: _FORWARD,
    Opcode.RECOMPUTE: _AGAIN,
    Opcode.BACKWARD: _BACKWARD,
    Opcode.BACKWARD_INPUT: _HALF,
    Opcode.BACKWARD_WEIGHT: _HALF,
}
_RETURNS = (Opcode.BACKWARD, Opcode.BACKWARD_INPUT)
"""What sends gradients to the stage before."""


class OrderTime:
    """The order's time as a function of boundaries and recompute.

    Args:
        instance: of the placement's choice.
        steps: `steps_of` a placement of the choice; every stage's backward behind a RECOMPUTE,
            which takes time where a split has one.
        num_more: micro-batches that the order leaves out: each takes as long as the busiest rank
            needs for one.
    """

    def __init__(self, instance: Instance, steps: Sequence[Step], num_more: int = 0) -> None:
        self._instance = instance
        self._steps = steps
        self._num_more = num_more

    def ticks_of_many(self, cuts: Cuts, recompute: Flags) -> Cuts:
        """Of splits, a row of boundaries and one of flags each."""
        stages = stages_of_many(self._instance, cuts, recompute)
        found: Cuts = np.broadcast_to(self._last(stages), len(cuts))
        return found

    def _last(self, stages: Sequence[StageTicks]) -> Ticks:
        pace = self._instance.pace
        durations = [
            (stage.forward, stage.rebuild, stage.backward, stage.backward / 2) for stage in stages
        ]
        free: list[Ticks] = [0] * pace.num_ranks
        links: dict[tuple[int, bool], Ticks] = {}
        weights = _weights_ready(stages, pace)
        done: list[Ticks] = []
        returned: list[Ticks] = [0] * len(stages)
        for rank, stage, column, source in self._steps:
            start, is_forward = free[rank], column == _FORWARD
            if is_forward and stage in weights:
                start = np.maximum(start, weights.pop(stage))
            if source >= 0:
                lag = stages[stage].arrival if is_forward else stages[stage + 1].gradient_arrival
                link = (rank, is_forward)
                come = np.maximum(done[source], links.get(link, 0)) + lag
                links[link] = come
                start = np.maximum(start, come)
            free[rank] = start + durations[stage][column]
            done.append(free[rank])
            if not is_forward:
                returned[stage] = free[rank]
        found = latest_of_many(*(_updated(stages, own, returned) for own in pace.own))
        if self._num_more:
            found = found + self._num_more * latest_of_many(
                *(_turn(stages, own) for own in pace.own)
            )
        return found


def _weights_ready(stages: Sequence[StageTicks], pace: Pace) -> dict[int, Ticks]:
    """When each stage's weights are gathered, if they are: one stage of a rank after the other."""
    found: dict[int, Ticks] = {}
    for own in pace.own if pace.gathers else ():
        moment: Ticks = 0
        for stage in own:
            moment = moment + stages[stage].gather
            found[stage] = moment
    return found


def _updated(stages: Sequence[StageTicks], own: Sequence[int], returned: Sequence[Ticks]) -> Ticks:
    """When the last of a rank's stages is reduced and updated."""
    moment: Ticks = 0
    for stage in reversed(own):
        moment = np.maximum(moment, returned[stage]) + stages[stage].reduce
    return moment + stages[own[0]].update + stages[own[0]].gather_updated


def _turn(stages: Sequence[StageTicks], own: Sequence[int]) -> Ticks:
    """One micro-batch through all of a rank's stages and back, or over its links."""
    work = sum(stages[s].forward + stages[s].rebuild + stages[s].backward for s in own)
    sent = [sum(stages[s].arrival for s in own), sum(stages[s].gradient_arrival for s in own)]
    return latest_of_many(work, *sent)


@lru_cache(maxsize=64)
def steps_of(placement: Placement) -> tuple[Step, ...]:
    """The compute steps of a placement's order, of all ranks, each behind what it waits for."""
    return tuple(_in_sequence(order_of(placement), placement.num_stages))


def _in_sequence(order: Order, num_stages: int) -> list[Step]:
    forward: dict[tuple[int, int], int] = {}
    backward: dict[tuple[int, int], int] = {}
    steps: list[Step] = []
    waiting: dict[tuple[bool, int, int], int] = {}
    next_of = [0] * len(order.ranks)

    def source_of(opcode: Opcode, stage: int, micro_batch: int) -> int | None:
        """Position of what it reads; -1 where that is nothing, None where it is still to come."""
        if opcode is Opcode.FORWARD:
            return forward.get((stage - 1, micro_batch)) if stage else -1
        if opcode in _RETURNS and stage < num_stages - 1:
            return backward.get((stage + 1, micro_batch))
        return -1

    ready = list(range(len(order.ranks)))
    while ready:
        rank = ready.pop()
        own = order.ranks[rank]
        while next_of[rank] < len(own):
            step = own[next_of[rank]]
            key = (step.stage, step.micro_batch)
            source = source_of(step.opcode, *key)
            if source is None:
                shift = -1 if step.opcode is Opcode.FORWARD else 1
                waiting[step.opcode is Opcode.FORWARD, step.stage + shift, step.micro_batch] = rank
                break
            column = _COLUMNS[step.opcode]
            if step.opcode is Opcode.FORWARD:
                forward[key] = len(steps)
            elif step.opcode in _RETURNS:
                backward[key] = len(steps)
            if step.opcode is Opcode.FORWARD or step.opcode in _RETURNS:
                reader = waiting.pop((step.opcode is Opcode.FORWARD, *key), None)
                if reader is not None:
                    ready.append(reader)
            steps.append(Step(rank, step.stage, column, source))
            next_of[rank] += 1
    assert len(steps) == sum(map(len, order.ranks)), "the order waits for itself"
    return steps
