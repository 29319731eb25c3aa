"""Where the user's own code raised, and its `build_model`, which planning and running both call.

An error in a model file is the user's to correct: the line matters, the frames of torch and of
this program do not.
"""

import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from planner.errors import ModelFileError

__all__ = ["build_on_meta", "raised_at", "recorded_at"]

_PACKAGE = Path(__file__).parent.parent
_NOT_THE_USERS = ("<", *(f"{path}/" for path in (
    Path(torch.__file__).parent, _PACKAGE, _PACKAGE.parent / "runtime"
)))  # fmt: skip
_FRAME = re.compile(r'File "([^"\n]*)", line ([0-9]+), in (\S+)(?:\n    (.*))?')
_MAX_FRAMES = 3


def raised_at(error: BaseException) -> str:
    """The innermost lines of the user's code that an error came through; empty if there are none.

    A line for each of at most three frames, the innermost last, each after a line break.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return _lines((f.filename, f.lineno or 0, f.name, f.line or "") for f in frames)


def recorded_at(text: str) -> str:
    """The same from a stack that torch wrote down (`fx.Node.stack_trace`)."""
    return _lines(
        (name, int(line), function, code) for name, line, function, code in _FRAME.findall(text)
    )


def _lines(frames: Iterable[tuple[str, int, str, str]]) -> str:
    """Of (file, line, function, code)."""
    users = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    return "".join(
        f"\n  {name}, line {line}, in {function}: {code}"
        for name, line, function, code in users[-_MAX_FRAMES:]
    )


def build_on_meta(build_model: Callable[[], nn.Module], name: str) -> nn.Module:
    """Build the model without allocating it.

    Raises:
        ModelFileError: `build_model` fails, or returns something other than a module.
    """
    try:
        with torch.device("meta"):
            model = build_model()
    except (Exception, SystemExit) as error:
        hint = "correct build_model"
        if "meta" in str(error):
            hint = (
                "it is called under torch.device('meta'), where tensors have no values: give "
                "tensors whose values it reads device='cpu'"
            )
        raise ModelFileError(
            f"build_model() of {name} raised {type(error).__name__}: {error}{raised_at(error)}",
            hint=hint,
        ) from None
    if not isinstance(model, nn.Module):
        raise ModelFileError(
            f"build_model() of {name} returned {type(model).__name__}, not a torch.nn.Module",
            hint="return the model itself",
        )
    return model
