"""Programs and stage code as lines of text: one instruction, one statement, one line.

    compute  FORWARD      stage 3 micro_batch 1 : h_2.1 weights:float32.0 -> h_3.1 saved:3.1

The words before the colon are the stream, the opcode and what it is about; after it stand the
buffers read, and, behind the arrow, the buffers written. This module knows the syntax. It does not
know what an instruction means, nor whether the program makes sense.
"""

import re
from functools import lru_cache
from sys import intern
from urllib.parse import quote, unquote

from planner.errors import PlanFileError
from planner.plan.code import Statement, parse_statement
from planner.plan.types import Instruction, Opcode

__all__ = [
    "parse_code",
    "parse_instruction",
    "parse_program",
    "print_code",
    "print_instruction",
    "print_program",
]

_OPCODES = {opcode.value: opcode for opcode in Opcode}
_SAFE = "!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
"""Printable ASCII that may stand in a name as it is: all but the blank and the percent sign."""
_MAX_CHARACTERS = 1_000_000
"""Of a line: an instruction that names ten thousand buffers has fewer."""
_LINE = re.compile(
    r"(\S+) +([A-Z_]+) +(?:stage ([0-9]{1,18}) )?(?:micro_batch ([0-9]{1,18}) )?"
    r"(?:unit (\S+) )?(?:peer ([0-9]{1,18}) )?:(?: (.*))?"
)


def print_instruction(instruction: Instruction) -> str:
    """One line; names with blanks or other rare characters are percent-encoded."""
    line = f"{_word(instruction.stream):<8} {instruction.opcode.value:<12} "
    if instruction.stage is not None:
        line += f"stage {instruction.stage} "
    if instruction.micro_batch is not None:
        line += f"micro_batch {instruction.micro_batch} "
    if instruction.unit is not None:
        line += f"unit {_word(instruction.unit)} "
    if instruction.peer is not None:
        line += f"peer {instruction.peer} "
    words = [line + ":", *map(_word, instruction.reads)]
    if instruction.writes:
        words += ["->", *map(_word, instruction.writes)]
    return " ".join(words)


def parse_instruction(line: str) -> Instruction:
    """Read one line back; `parse_instruction(print_instruction(i)) == i`.

    Raises:
        PlanFileError: the line is not an instruction.
    """
    found = _LINE.fullmatch(line) if len(line) <= _MAX_CHARACTERS else None
    opcode = _OPCODES.get(found[2]) if found else None
    if found is None or opcode is None:
        raise _bad(line)
    stream, _, stage, micro_batch, unit, peer, buffers = found.groups()
    reads, _, writes = f" {buffers or ''}".partition(" -> ")
    try:
        return Instruction(
            opcode=opcode,
            stream=_name(stream),
            stage=None if stage is None else int(stage),
            micro_batch=None if micro_batch is None else int(micro_batch),
            unit=None if unit is None else _name(unit),
            peer=None if peer is None else int(peer),
            reads=_names(reads),
            writes=_names(writes),
        )
    except ValueError:  # of a percent sign before what is no character
        raise _bad(line) from None


def print_program(program: tuple[Instruction, ...]) -> str:
    """One instruction per line."""
    return "".join(print_instruction(instruction) + "\n" for instruction in program)


def parse_program(text: str) -> tuple[Instruction, ...]:
    """Read a program back.

    Raises:
        PlanFileError: a line is not an instruction.
    """
    return tuple(parse_instruction(line) for line in text.split("\n") if line)


def print_code(code: tuple[Statement, ...]) -> str:
    """One statement per line."""
    return "".join(f"{statement}\n" for statement in code)


def parse_code(text: str) -> tuple[Statement, ...]:
    """Read the code of a stage back.

    Raises:
        PlanFileError: a line is not a permitted statement.
    """
    return tuple(parse_statement(line) for line in text.split("\n") if line)


@lru_cache(maxsize=1 << 16)
def _word(name: str) -> str:
    if name in (":", "->", ""):
        return "%" + "".join(f"{ord(letter):02X}%" for letter in name).removesuffix("%")
    return quote(name, safe=_SAFE)


def _names(words: str) -> tuple[str, ...]:
    """Names of buffers; interned, because each stands in several instructions."""
    if "%" in words:
        return tuple(map(_name, words.split()))
    return tuple(map(intern, words.split()))


def _name(word: str) -> str:
    if "%" not in word:
        return intern(word)
    return "" if word == "%" else unquote(word, errors="strict")


def _bad(line: str) -> PlanFileError:
    return PlanFileError(
        f"the plan holds the line {line[:120]!r}, which is not an instruction "
        "(stream, opcode, what it is about, colon, buffers read, arrow, buffers written)",
        hint="make the plan again with lga-plan",
    )
