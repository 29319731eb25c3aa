"""The step-time model: the longest path through the stages, for numbers and for CP-SAT alike.

Every quantity is a number of ticks, an array of them (one per split) or a linear expression of
CP-SAT, and the only operation besides addition is `latest`, so that one text serves to evaluate a
split, to evaluate many, and to search for one.

A rank works through its stages in the layered order: all micro-batches of a stage, then its next
stage. So a path through the step either follows one micro-batch from stage to stage, or waits in
one stage, or on one link, for all the others; between two restarts of a rank it does the latter
once, in the longest stage or link on its way. Two moments per stage are therefore enough: when its
first micro-batch is done (`opened`) and when its last is (`closed`). For layers of known cost and
links that are never shared, the result is the makespan of the layered order, not an estimate of it.

What a rank does between two of its stages is in `planner.solve.streams`.
"""

from collections.abc import Callable, Sequence

from planner.solve.step_parts import LOOKAHEAD, Pace, StageTicks, Ticks
from planner.solve.streams import Streams

__all__ = ["step_time"]


def step_time(stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks]) -> Ticks:
    """Ticks from the start of the step to the end of its last instruction.

    `latest` is given two moments or more.
    """
    streams = Streams(stages, pace, latest)
    _forward(stages, pace, latest, streams)
    _backward(stages, pace, latest, streams)
    return streams.end()


def _forward(
    stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks], streams: Streams
) -> None:
    """When each stage has run forward for its first and for all micro-batches."""
    count, ranks, held = pace.num_micro_batches, pace.stage_ranks, streams.held
    opened: list[Ticks] = []
    closed: list[Ticks] = []
    for index, stage in enumerate(stages):
        ready = [held[ranks[index]] + stage.load]
        if pace.gathers:
            ready.append(streams.gathered[index])
        if index:
            come = streams.transfer(index - 1, index, opened[-1], closed[-1], stage.arrival)
            ready.append(come.first)
        first = (latest(*ready) if len(ready) > 1 else ready[0]) + stage.forward
        done = [first + (count - 1) * (stage.forward + stage.load) + stage.sending]
        if pace.offloads_inputs and count > 2 * LOOKAHEAD:
            done.append(first + (count - LOOKAHEAD - 1) * stage.inputs + stage.forward)
        if index:
            done.append(come.last + stage.forward)
        if pace.gathers and pace.offloads_state:
            streams.after_first_forward(index, first, done)
        opened.append(first)
        closed.append(latest(*done) if len(done) > 1 else done[0])
        streams.after_forward(index, closed[-1])


def _backward(
    stages: Sequence[StageTicks], pace: Pace, latest: Callable[..., Ticks], streams: Streams
) -> None:
    """The same for backward, from the last stage to the first."""
    count, ranks, held = pace.num_micro_batches, pace.stage_ranks, streams.held
    opened: Ticks = 0
    almost: Ticks = 0
    closed: Ticks = 0
    arrival: Ticks = 0
    for index in reversed(range(len(stages))):
        stage, is_last = stages[index], index == len(stages) - 1
        start = held[ranks[index]]
        if index in streams.regathered:
            start = latest(start, streams.regathered[index])
        # It is run forward again before its gradients are there.
        ready = [start + stage.rebuild]
        if pace.reduces and pace.num_buffers == 1 and pace.following[index] >= 0:
            ready.append(streams.reduced[pace.following[index]])
        if not is_last:
            come = streams.transfer(index + 1, index, opened, closed, arrival)
            ready.append(come.first)
        first = (latest(*ready) if len(ready) > 1 else ready[0]) + stage.backward
        turn = stage.rebuild + stage.backward
        done = [first + (count - 1) * turn + stage.returning]
        if pace.offloads_inputs and count > 2 * LOOKAHEAD:
            done.append(first + (count - LOOKAHEAD - 1) * stage.inputs + stage.backward)
        if not is_last:
            done.append(come.last + stage.backward)
        if pace.updates_early:
            # The update of the stage before stands ahead of the last micro-batch.
            penultimate = [first + (count - 2) * turn]
            if not is_last:
                penultimate.append(almost + arrival + stage.backward)
                penultimate.append(opened + (count - 1) * arrival + stage.backward)
            almost = latest(*penultimate) if len(penultimate) > 1 else penultimate[0]
            if pace.following[index] >= 0:
                done.append(streams.update_early(index, first, almost) + turn)
        opened, arrival = first, stage.gradient_arrival
        closed = latest(*done) if len(done) > 1 else done[0]
        streams.after_backward(index, opened, closed)
