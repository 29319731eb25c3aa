"""Which backends of torch.compile can be used here.

torch._dynamo and what belongs to it are imported where they are used: they take a second, and most
runs do without. This module knows torch's tools. It does not know what is compiled.
"""

from difflib import get_close_matches

import torch

from planner.errors import UsageError

__all__ = ["DEFAULT_BACKEND", "check_backend", "has_cpp_compiler"]

DEFAULT_BACKEND = "inductor"


def check_backend(name: str, device: torch.device) -> None:
    """
    Raises:
        UsageError: torch.compile has no such backend, or it lacks the compiler that it needs for
            this device.
    """
    known = [each for each in torch._dynamo.list_backends(()) if "TESTING_ONLY" not in each]
    if name not in torch._dynamo.list_backends(()):
        close = get_close_matches(name, known, n=1)
        raise UsageError(
            f"torch.compile has no backend {name!r}; it has {', '.join(known)}",
            hint=f"did you mean {close[0]!r}?" if close else f"{DEFAULT_BACKEND!r} is its default",
        )
    missing = _missing_tool(device) if name == DEFAULT_BACKEND else ""
    if missing:
        raise UsageError(
            f"torch.compile's backend {name!r} needs {missing} for a device of type "
            f"{device.type!r}, and there is none here",
            hint=f"install {missing}, or take the backend 'aot_eager', which needs none",
        )


def has_cpp_compiler() -> bool:
    """Whether inductor finds one."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def _missing_tool(device: torch.device) -> str:
    """What inductor would look for in vain."""
    from torch.utils._triton import has_triton

    if device.type == "cpu":
        return "" if has_cpp_compiler() else "a C++ compiler"
    return "" if has_triton() else "triton"
