"""Corruptions of plan files, chosen by a seed: of bytes, of text under fresh checksums, of values.

This module knows how to spoil text. It does not know what reading it should do.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import yaml

from planner.plan import sections

__all__ = ["corrupted_bytes", "corrupted_program", "corrupted_text", "corrupted_values", "sealed"]

ODD = (
    "\0", "\x07", "\t", "\r", "\x1b", "\x85", "\xa0", "\u2028", "\ufeff", "é", "漢", "🙂", "%", "'",
    '"', "{", "}", "[", "]", ":", "-", "#", "&", "*", "!", "|", ">", "~", "<<", "---", "...", "\\",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "-0", "007", "1e9", "1.5", ".inf", "-.inf", ".nan", "9" * 30, "9" * 6000,
    "1" + "0" * 12, "4294967296", "9223372036854775807", "9223372036854775808", "0x7f", "1_000",
    "٣", "true",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 10**12, 2**63 - 1, 10**30, 10**400, -(10**30), 0.0,
    -0.5, 1e-320, 1e308, float("inf"), float("nan"), "", " ", "x", "%", "-", "loss", "finite",
    "é漢", "\n", "\x85", "\u2028", "x" * 100_000, "../../etc/passwd", "2001-01-01", "null", [], {},
    [[]], [0], ["x"], {"x": 0}, {"": None}, [0] * 5000,
)  # fmt: skip
YAML_TEXTS = (
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/object/new:subprocess.Popen [['touch', 'canary']]", "!!python/name:os.system ''",
    "!!python/tuple [1]", "!!binary aGk=", "!!float 1", "! x", "!!set {a, b}", "&a [x, *a]", "*a",
    "&a x", "{<<: {a: 1}}", "{a: 1, a: 2}", "{[a]: 1}", "{? {a: 1} : 2}", "{1: 2}", "",
    "\n  &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b]", "[" * 5000,
    "[" * 15 + "]" * 15, "{a: " * 300, "- " * 300, "x\n---\ny: 1", "x\n...\n", "%YAML 1.2", "'x",
    '"\\x', "|9\n x", ">-\n x\n y", "[" + "[]," * 20_000 + "]",
)  # fmt: skip
STATEMENTS = (
    "t = __import__('os').system('touch canary')", "t = layer('x')(__import__('os'))", "import os",
    "t = exec('import os')", "t = getattr(x, '__class__')", "t = aten.from_file.default('x')",
    "t = getitem(" + "[" * 90 + "]" * 90 + ")", "t = getitem(" + "(" * 3000,
    "t = getitem(" + "-" * 5000 + "1)", "t = getitem(" + "1+" * 5000 + "1)",
    "t = aten." + "a." * 900 + "b(x)", "t = aten" + ".a" * 90_000,
    "t = getitem(0x" + "F" * 9000 + ")", "t = getitem(" + "9" * 9000 + ")",
    "t = getitem(1if 1else 2)", "t = getitem('\\d')", "t = getitem([" + "1," * 50_000 + "])",
    "t = getitem(lambda: 1)", "t = getitem(x for x in y)", "t = getitem(f'{exit()}')",
    "t = getitem({**x})", "t = getitem(*x)", "t = layer('x' * 10**9)(x)", "t = getitem(10**10**10)",
    "t = getitem(x)  # random 1 999999999999999999", "t = getitem(x)  # random -1 2",
    "t = getattr(x, y)", "t = unflatten('[1, {\"__enum__\": true, \"fqn\": \"os:x\"}]', [])",
    "t = getitem(\0)", "(t) = u = getitem(x)", "t: int = getitem(x)", "",
)  # fmt: skip
CHANGES = (
    "swap", "drop", "double", "move", "shuffle", "word", "word", "number", "number", "other"
)  # fmt: skip


def corrupted_bytes(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed: flipped, put in, left out, doubled, swapped, cut, or encoded anew."""
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        content = _changed(content, dice)
    return content


def _changed(content: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(content) + 1)
    end = min(len(content), start + dice.choice((1, 2, 8, 100, 5000)))
    before, middle, after = content[:start], content[start:end], content[end:]
    bit = 1 << dice.randrange(8)
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: before + bytes(byte ^ bit for byte in middle[:1]) + middle[1:] + after,
        lambda: before + dice.randbytes(dice.choice((1, 3, 50))) + middle + after,
        lambda: before + after,
        lambda: before + middle + middle + after,
        lambda: before + after + middle,
        lambda: before,
        lambda: after,
        lambda: before + dice.choice(ODD).encode() + middle + after,
        lambda: before + dice.choice(NUMBERS).encode() + after,
        lambda: before + b"\n" * dice.choice((1, 50)) + middle + after,
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode(errors="replace").encode("utf-16"),
        lambda: before + b"a" * 300_000 + after,
        lambda: content * 3,
    )
    return dice.choice(changes)()


def corrupted_text(text: str, dice: random.Random) -> str:
    """The body changed somewhere, then sealed again, so that what is behind the seal is reached."""
    head, seal, body = text.split("\n", 2)
    for _ in range(dice.choice((1, 1, 2, 4))):
        lines = body.split("\n")
        number = dice.randrange(len(lines))
        line = lines[number]
        place = dice.randrange(len(line) + 1)
        words = re.findall(r"[\w.:]+", body[:20_000]) or ["x"]
        change = dice.randrange(8)
        if change == 0:
            lines[number] = line[:place] + dice.choice(ODD) + line[place:]
        elif change == 1:
            lines[number] = line[:place] + line[place + 1 :]
        elif change == 2:
            lines[number] = _instead(r"[0-9.]+", line, dice.choice(NUMBERS), dice)
        elif change == 3:
            lines[number] = _instead(r"[\w.:]+", line, dice.choice(words), dice)
        elif change == 4:
            lines[number] = line.partition(": ")[0] + ": " + dice.choice(YAML_TEXTS)
        elif change == 5:
            other = dice.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
        elif change == 6:
            lines[number] = dice.choice((line + "\n" + line, "", line + dice.choice(YAML_TEXTS)))
        else:
            lines[number] = line[: len(line) - len(line.lstrip())] + dice.choice(STATEMENTS)
        body = "\n".join(lines)
    return sealed(f"{head}\n{seal}\n{body}")


def corrupted_values(text: str, dice: random.Random) -> str:
    """Values changed anywhere in the sections, printed as YAML and sealed again."""
    loaded = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = loaded.pop("lga_plan")
    del loaded["checksums"]
    for _ in range(dice.choice((1, 1, 2, 3))):
        programs = loaded.get("programs")
        if dice.random() < 0.4 and isinstance(programs, list) and programs:
            rank = dice.randrange(len(programs))
            programs[rank] = corrupted_program(str(programs[rank]), dice)
        else:
            _spoil(loaded, dice)
    parts = [yaml.safe_dump({name: value}, sort_keys=False) for name, value in loaded.items()]
    return sealed(f"lga_plan: {version}\nchecksums: {{}}\n" + "".join(parts))


def corrupted_program(text: str, dice: random.Random) -> str:
    """Lines of a program, or of a stage's code, moved, lost, doubled or made of other words."""
    lines = text.split("\n")
    for _ in range(dice.choice((1, 1, 2, 5))):
        first, second = dice.randrange(len(lines)), dice.randrange(len(lines))
        change = dice.choice(CHANGES)
        if change == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        elif change == "drop":
            lines[first] = ""
        elif change == "double":
            lines.insert(second, lines[first])
        elif change == "move":
            lines.insert(second, lines.pop(first))
        elif change == "shuffle":
            dice.shuffle(lines)
        elif change == "word":
            word = dice.choice(lines[second].split() or ["LOAD"])
            lines[first] = _instead(r"\S+", lines[first], word, dice)
        elif change == "number":
            lines[first] = _instead(
                r"\d+", lines[first], dice.choice((*"01230123", *NUMBERS)), dice
            )
        else:
            lines[first] = dice.choice(
                (*STATEMENTS, "a " * 50_000, "% % : %", "a SEND : %ff -> %80")
            )
    return "\n".join(lines)


def sealed(text: str) -> str:
    """The text with checksums that fit."""
    head, _, body = text.split("\n", 2)
    _, _, parts = sections._split(f"\n{body}".encode(errors="surrogatepass"), 0)
    checksums = {name: sections._checksum(part) for name, part in parts.items()}
    return f"{head}\n{sections._checksum_line(checksums)}\n{body}"


def _instead(pattern: str, line: str, word: str, dice: random.Random) -> str:
    """The line with one of the pattern's matches replaced."""
    found = list(re.finditer(pattern, line))
    if not found:
        return line
    match = dice.choice(found)
    return line[: match.start()] + word + line[match.end() :]


def _spoil(value: Any, dice: random.Random) -> None:
    """Change one value somewhere inside a mapping or list."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key, other = dice.choice(keys), dice.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and dice.random() < 0.9:
        _spoil(value[key], dice)
        return
    child = value[key]
    if isinstance(child, str) and child.count("\n") > 1 and dice.random() < 0.8:
        value[key] = corrupted_program(child, dice)
        return
    choices: list[Callable[[], Any]] = [
        lambda: dice.choice(VALUES),
        lambda: value[other],
        lambda: [child],
        lambda: {"x": child},
        lambda: str(child),
    ]
    if isinstance(child, int | float):
        near = (lambda: child + 1, lambda: max(child - 1, 0), lambda: child // 2, lambda: not child)
        choices += [*near, *near, lambda: -child, lambda: child * 10**9, lambda: child + 0.5]
    if isinstance(child, str) and child:
        choices += [lambda: child + dice.choice(ODD), lambda: child[1:], lambda: child * 1000]
        choices += [lambda: value[other]] * 3
    if isinstance(child, list):
        choices += [lambda: child * 2, lambda: child[1:], lambda: child[::-1]]
    value[key] = dice.choice(choices)()
    if dice.random() < 0.1:
        del value[key]
    elif dice.random() < 0.1 and isinstance(value, list):
        value.append(value[other])
    elif dice.random() < 0.1 and isinstance(value, dict):
        value[dice.choice(("extra", "x" * 200, "é", "code"))] = dice.choice(VALUES)
