"""How one process ends when the run has failed.

Knows the error file that torch's launchers read, and that a process whose peers are gone must not
try to take anything down. `lga-run` says what happened once for all ranks, from these files.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from planner.errors import LgaError
from planner.model_file import raised_at

__all__ = ["LAUNCHED_BY_LGA_RUN", "FailureReport", "end_process", "read_report"]

LAUNCHED_BY_LGA_RUN = "LGA_RUN_PARENT"
"""Environment variable: lga-run is the parent and prints the error."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """What a rank says about its end."""

    message: str
    hint: str
    consequence: bool
    """Another rank's failure was the cause."""
    exit_code: int

    @classmethod
    def of(cls, error: BaseException, *, consequence: bool = False) -> "FailureReport":
        match error:
            case LgaError():
                text, hint, code = error.message, error.hint, error.exit_code
            case SystemExit():
                text = f"the model or data called sys.exit({error.code!r}){raised_at(error)}"
                hint, code = "", 1
            case _:
                text = f"{type(error).__name__}: {error}".rstrip(": ") + raised_at(error)
                hint, code = "", 1
        return cls(message=text, hint=hint, consequence=consequence, exit_code=code)


def end_process(report: FailureReport) -> NoReturn:
    """Leave the last words and end at once, whatever other threads are blocked in."""
    if path := os.environ.get(_ERROR_FILE):
        extra = {
            "py_callstack": report.message,
            "timestamp": str(int(time.time())),
            "hint": report.hint,
            "consequence": report.consequence,
        }
        words = {"message": {"message": report.message, "extraInfo": extra}}
        try:
            with open(path, "w") as file:
                json.dump(words, file)
        except OSError:  # the words below are then all that is left
            os.environ.pop(LAUNCHED_BY_LGA_RUN, None)
    if LAUNCHED_BY_LGA_RUN not in os.environ:
        hint = f"\n  try: {report.hint}" if report.hint else ""
        sys.stderr.write(f"error: {report.message}{hint}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(report.exit_code)


def read_report(words: dict[str, object], exit_code: int) -> FailureReport | None:
    """The report in the data of a rank's error file; None where the rank left none."""
    match words.get("message"):
        case {"message": str(text), "extraInfo": {"hint": str(hint), "consequence": bool(after)}}:
            return FailureReport(message=text, hint=hint, consequence=after, exit_code=exit_code)
    return None
