"""The function of every instruction.

It is called once for each instruction of a program, when the executor is built, and returns what
the instruction does in every step.
"""

from collections.abc import Callable
from functools import partial

from planner.plan.types import Instruction, Opcode
from runtime.handlers.compute import backward, forward, recompute
from runtime.handlers.data import gather, reduce, reduce_tied
from runtime.handlers.movement import evict, fetch, load, receive, release, send
from runtime.handlers.update import check_finite, clip, save, update
from runtime.state import RankState

__all__ = ["HANDLERS", "Action", "Handler", "each_time"]

Action = Callable[[], None]
Handler = Callable[[RankState, Instruction], Action]


def each_time(function: Callable[[RankState, Instruction], None]) -> Handler:
    """The handler of an instruction that has little to prepare: all is done when it runs."""
    return lambda rank, instruction: partial(function, rank, instruction)


HANDLERS: dict[Opcode, Handler] = {
    Opcode.LOAD: load,
    Opcode.FETCH: each_time(fetch),
    Opcode.EVICT: each_time(evict),
    Opcode.GATHER: each_time(gather),
    Opcode.RELEASE: each_time(release),
    Opcode.RECEIVE: receive,
    Opcode.SEND: send,
    Opcode.FORWARD: forward,
    Opcode.RECOMPUTE: recompute,
    Opcode.BACKWARD: backward,
    Opcode.BACKWARD_INPUT: backward,
    Opcode.BACKWARD_WEIGHT: backward,
    Opcode.REDUCE: each_time(reduce),
    Opcode.REDUCE_TIED: each_time(reduce_tied),
    Opcode.CHECK_FINITE: each_time(check_finite),
    Opcode.CLIP: each_time(clip),
    Opcode.UPDATE: each_time(update),
    Opcode.SAVE: each_time(save),
}
