"""Names that handlers make from an instruction, and its description for errors."""

from planner.plan.types import Instruction

__all__ = ["describe", "saved_name", "tensor_of"]


def saved_name(instruction: Instruction) -> str:
    """The buffer of what forward keeps for backward."""
    return f"saved:{instruction.stage}.{instruction.micro_batch}"


def tensor_of(buffer: str) -> str:
    """`h` of `h.3`, `gradient:h.3` or `batch:h.3`."""
    return buffer.rpartition(":")[2].rpartition(".")[0]


def describe(instruction: Instruction) -> str:
    """The instruction in words, for errors."""
    words = [str(instruction.opcode)]
    if instruction.stage is not None:
        words.append(f"stage {instruction.stage}")
    if instruction.unit is not None:
        words.append(f"unit {instruction.unit}")
    if instruction.micro_batch is not None:
        words.append(f"micro-batch {instruction.micro_batch}")
    names = instruction.writes or instruction.reads
    return f"{' '.join(words)} ({', '.join(names)})"
