"""The cells of a torch.distributed.pipelining CSV: text to actions, each with its place in it.

Knows torch 2.13's spelling of actions. Does not know whether they make a schedule.
"""

import csv
import io
import re
from dataclasses import dataclass

from planner.errors import UsageError

__all__ = ["HINT", "Action", "read_rows"]

HINT = "give a CSV with a row per rank, as torch's _dump_csv and lga-show --csv write it"
_ACTION = re.compile(
    r"([0-9]{1,9})(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]{1,9})|(UNSHARD|RESHARD|REDUCE_GRAD))"
)
_MAX_ACTIONS = 1_000_000
"""More make a plan that is too large to be read again."""
_MAX_RANKS = 1 << 13
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One action and where it stands."""

    word: str
    """As it is written: `3SEND_B1`."""
    kind: str
    """The letters in it."""
    stage: int
    micro_batch: int | None
    rank: int
    position: int
    """Among the actions of its rank."""
    cell: str
    """Where it stands in the file, in words."""

    @property
    def place(self) -> str:
        return f"{self.cell}: {self.word}"


def read_rows(text: str, source: str) -> list[list[Action]]:
    """The actions of each rank; `source` names the file in messages.

    Raises:
        UsageError: the text is no CSV, a row is empty, a cell is no action, or there are too many.
    """
    try:
        cells = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UsageError(f"{source} is no CSV: {error}", hint=HINT) from None
    while cells and not any(cell.strip() for cell in cells[-1]):
        cells.pop()
    if not cells:
        raise UsageError(f"{source} holds no action", hint=HINT)
    if len(cells) > _MAX_RANKS:
        raise UsageError(
            f"{source} has {len(cells)} rows, more than {_MAX_RANKS} ranks",
            hint=HINT,
        )
    if sum(cell.count(";") + 1 for row in cells for cell in row if cell) > _MAX_ACTIONS:
        raise UsageError(f"{source} has more than {_MAX_ACTIONS} actions", hint=HINT)
    rows = []
    for rank, row in enumerate(cells):
        found: list[Action] = []
        for column, cell in enumerate(row):
            place = f"{source}: row {rank + 1} (rank {rank}), column {column + 1}"
            for word in _words(cell.strip()):
                found.append(_action(word, rank, len(found), place))
        if not found:
            raise UsageError(f"{source}: row {rank + 1} (rank {rank}) is empty", hint=HINT)
        rows.append(found)
    return rows


def _words(cell: str) -> list[str]:
    if match := _OVERLAP.fullmatch(cell):
        return [word.strip() for word in match[1].split(";")]
    return [cell] if cell else []


def _action(word: str, rank: int, position: int, cell: str) -> Action:
    match = _ACTION.fullmatch(word)
    if match is None:
        raise UsageError(
            f"{cell}: {word[:40]!r} is no action",
            hint="an action is a stage, a letter and a micro-batch, such as 2F0 or 3SEND_B1",
        )
    return Action(
        word=word,
        kind=match[2] or match[4],
        stage=int(match[1]),
        micro_batch=int(match[3]) if match[3] else None,
        rank=rank,
        position=position,
        cell=cell,
    )
