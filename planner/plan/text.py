"""Programs and stage code as lines of text: one instruction, one statement, one line.

    compute  FORWARD      stage 3 micro_batch 1 : h_2.1 weights:float32.0 -> h_3.1 saved:3.1

The words before the colon are the stream, the opcode and what it is about; after it stand the
buffers read, and, behind the arrow, the buffers written. This module knows the syntax. It does not
know what an instruction means, nor whether the program makes sense.
"""

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


def print_instruction(instruction: Instruction) -> str:
    """One line; names with blanks or other rare characters are percent-encoded."""
    about = [
        f"{key} {value}"
        for key, value in (
            ("stage", instruction.stage),
            ("micro_batch", instruction.micro_batch),
            ("unit", None if instruction.unit is None else _word(instruction.unit)),
            ("peer", instruction.peer),
        )
        if value is not None
    ]
    words = [f"{_word(instruction.stream):<8} {instruction.opcode.value:<12}", *about, ":"]
    words += map(_word, instruction.reads)
    if instruction.writes:
        words += ["->", *map(_word, instruction.writes)]
    return " ".join(words)


def parse_instruction(line: str) -> Instruction:
    """Read one line back; `parse_instruction(print_instruction(i)) == i`.

    Raises:
        PlanFileError: the line is not an instruction.
    """
    words = line.split()
    try:
        colon = words.index(":")
        stream, opcode = words[:2]
        about = dict(zip(words[2:colon:2], words[3:colon:2], strict=True))
        buffers = [_name(word) for word in words[colon + 1 :]]
        arrow = words.index("->", colon) - colon - 1 if "->" in words[colon:] else len(buffers)
        unit = about.pop("unit", None)
        numbers = {key: _number(value) for key, value in about.items()}
        if len(numbers) * 2 + (0 if unit is None else 2) != colon - 2:
            raise ValueError("a word stands twice")
        return Instruction(
            opcode=_OPCODES[opcode],
            stream=_name(stream),
            unit=None if unit is None else _name(unit),
            stage=numbers.pop("stage", None),
            micro_batch=numbers.pop("micro_batch", None),
            peer=numbers.pop("peer", None),
            reads=tuple(buffers[:arrow]),
            writes=tuple(buffers[arrow + 1 :]),
            **numbers,  # an unknown word is a TypeError
        )
    except (ValueError, KeyError, TypeError):
        raise PlanFileError(
            f"the plan holds the line {line[:120]!r}, which is not an instruction "
            "(stream, opcode, what it is about, colon, buffers read, arrow, buffers written)",
            hint="make the plan again with lga-plan",
        ) from None


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


def _word(name: str) -> str:
    if name.isascii() and name.isidentifier():
        return name
    if name in (":", "->", ""):
        return "%" + "".join(f"{ord(letter):02X}%" for letter in name).removesuffix("%")
    return quote(name, safe=_SAFE)


def _name(word: str) -> str:
    if "%" not in word:
        return word
    return "" if word == "%" else unquote(word, errors="strict")


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise ValueError(word)
    return int(word)
