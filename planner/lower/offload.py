"""Stored stage inputs on their way to host memory and back, between forward and backward.

An input leaves behind the last FORWARD that uses it; a few compute steps later it is released. That
waits for the copy, so no more than a few are on their way. It is fetched a few steps before the
first RECOMPUTE or BACKWARD that reads it. It stays where it is if there are not as many steps for
its way out as for its way back, or if this rank also sends it on: its way back would wait for a
receiver that may wait for this rank.
"""

from collections.abc import Sequence

from planner.lower.slots import LOOKAHEAD, Slots
from planner.plan.names import kind_of, stream_of
from planner.plan.types import Instruction, Opcode

__all__ = ["place_offload"]


def place_offload(slots: Slots, compute: Sequence[Instruction], sent: set[str]) -> None:
    """EVICT, RELEASE and FETCH of the inputs that a rank's `compute` instructions store.

    `sent` are the buffers that the rank sends.
    """
    stored_at: dict[str, int] = {}
    wanted_at: dict[str, tuple[int, int]] = {}
    for index, instruction in enumerate(compute):
        if instruction.opcode is Opcode.FORWARD:
            stored_at.update(dict.fromkeys((*instruction.reads, *instruction.writes), index))
        else:
            wanted = (index, instruction.micro_batch or 0)
            for buffer in instruction.reads:
                wanted_at.setdefault(buffer, wanted)
    for buffer, (index, micro_batch) in wanted_at.items():
        stored = stored_at.get(buffer, index)
        too_soon = index - stored <= 2 * LOOKAHEAD
        if too_soon or buffer in sent or kind_of(buffer) not in ("", "batch"):
            continue
        host = f"host:{buffer}"
        slots.behind(stored, _copy(Opcode.EVICT, micro_batch, buffer, host))
        release = _copy(Opcode.RELEASE, micro_batch, buffer, buffer)
        slots.behind(stored + LOOKAHEAD, release)
        slots.before(index - LOOKAHEAD, _copy(Opcode.FETCH, micro_batch, host, buffer))


def _copy(opcode: Opcode, micro_batch: int, source: str, target: str) -> Instruction:
    return Instruction(
        opcode=opcode,
        stream=stream_of(opcode),
        micro_batch=micro_batch,
        reads=(source,),
        writes=(target,),
    )
