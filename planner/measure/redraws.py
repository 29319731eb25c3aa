"""Sees whether backward draws random numbers that no forward has drawn.

Code that runs a part of forward again in backward (torch.utils.checkpoint) first restores the state
of torch's default generator, and draws again what was drawn: the runtime's keys follow it. What is
drawn without that is new, and depends on the order in which backwards run.
"""

from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.operators import is_random_operator

__all__ = ["NewDraws"]

_SEED = 0x5EED_0F_BAC4_3A2D
"""Of the default generator while nothing is restored."""


class NewDraws(TorchDispatchMode):
    """To be entered around a backward; leaves the default generator as it was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __enter__(self) -> Self:
        self._before = torch.get_rng_state()
        torch.default_generator.manual_seed(_SEED)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_rng_state(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_random_operator(func, args, kwargs):
            self.found |= torch.default_generator.initial_seed() == _SEED
        return func(*args, **kwargs)
