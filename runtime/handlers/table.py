"""The function of every instruction."""

from collections.abc import Callable

from planner.plan.types import Instruction, Opcode
from runtime.handlers.compute import backward, forward, recompute
from runtime.handlers.data import gather, reduce, reduce_tied
from runtime.handlers.movement import evict, fetch, load, receive, release, send
from runtime.handlers.update import check_finite, clip, save, update
from runtime.state import RankState

__all__ = ["HANDLERS"]

HANDLERS: dict[Opcode, Callable[[RankState, Instruction], None]] = {
    Opcode.LOAD: load,
    Opcode.FETCH: fetch,
    Opcode.EVICT: evict,
    Opcode.GATHER: gather,
    Opcode.RELEASE: release,
    Opcode.RECEIVE: receive,
    Opcode.SEND: send,
    Opcode.FORWARD: forward,
    Opcode.RECOMPUTE: recompute,
    Opcode.BACKWARD: backward,
    Opcode.BACKWARD_INPUT: backward,
    Opcode.BACKWARD_WEIGHT: backward,
    Opcode.REDUCE: reduce,
    Opcode.REDUCE_TIED: reduce_tied,
    Opcode.CHECK_FINITE: check_finite,
    Opcode.CLIP: clip,
    Opcode.UPDATE: update,
    Opcode.SAVE: save,
}
