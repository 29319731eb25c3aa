"""Names of buffers and streams: how they are made and taken apart.

This module knows the spelling. It does not know which instruction may name what.
"""

from functools import lru_cache

from planner.plan.types import Opcode

__all__ = ["STREAMS", "buffer_key", "is_resident", "kind_of", "stream_of"]

STREAMS = {
    Opcode.LOAD: "copy.in",
    Opcode.FETCH: "copy.in",
    Opcode.EVICT: "copy.out",
    Opcode.SAVE: "copy.out",
    Opcode.GATHER: "data",
    Opcode.REDUCE: "data",
    Opcode.REDUCE_TIED: "data",
    Opcode.CHECK_FINITE: "data",
    Opcode.CLIP: "data",
}
"""Of instructions that are neither transfers (a stream per peer and direction) nor compute."""

_WHOLE_NAMES = ("weights", "sum", "shard", "moments", "reduced", "square", "clip")


def stream_of(opcode: Opcode, peer: int | None = None, *, on_host: bool = False) -> str:
    """The stream that an instruction belongs to; `on_host` says where the plan's updates run."""
    if on_host and opcode is Opcode.UPDATE:
        return "host"
    if opcode is Opcode.SEND:
        return f"to.{peer}"
    if opcode is Opcode.RECEIVE:
        return f"from.{peer}"
    return STREAMS.get(opcode, "compute")


def kind_of(buffer: str) -> str:
    """`saved` of `saved:3.1`, `host` of `host:shard:stage.3`; empty for boundary tensors."""
    return buffer.partition(":")[0] if ":" in buffer else ""


@lru_cache(maxsize=1 << 20)
def buffer_key(buffer: str) -> str:
    """Its name in the plan's table of buffers: without `.<m>` where each micro-batch has one."""
    kind = kind_of(buffer)
    if kind == "host":
        return "host:" + buffer_key(buffer.removeprefix("host:"))
    if kind in _WHOLE_NAMES or buffer in ("finite", "scale"):
        return buffer
    return buffer.rpartition(".")[0]


def is_resident(buffer: str) -> bool:
    """Whether a buffer is there through the whole step unless the plan offloads it."""
    return kind_of(buffer) in ("shard", "moments", "weights", "sum", "clip")
