"""Checkpointing that the model does between its layers, recorded as what it computes.

Whether activations are kept or made again is the plan's to decide. It changes no number: random
operators draw by keys. The variant that does not re-enter autograd leaves no trace among operators;
the one that does is an autograd function. Layers that checkpoint themselves run as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from planner.errors import TraceError

__all__ = ["Checkpoints", "plain_checkpoints"]


class Checkpoints:
    """Knows whether what runs now would run again in backward."""

    def __init__(self) -> None:
        self.num_entered = 0
        """Of those that re-enter autograd."""

    @property
    def is_inside(self) -> bool:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        # The variant that does not re-enter looks at what autograd saves.
        return self.num_entered > 0 or (
            hooks is not None
            and getattr(hooks[0], "__module__", "") == torch.utils.checkpoint.__name__
        )

    @contextmanager
    def refuse_statistics(self, path: str, layer: nn.Module) -> Iterator[None]:
        """Refuse a layer that changes its buffers where eager code would run it twice.

        Raises:
            TraceError: names the layer.
        """
        buffers = list(layer.buffers()) if self.is_inside else []
        versions = [buffer._version for buffer in buffers]
        yield
        if [buffer._version for buffer in buffers] != versions:
            raise TraceError(
                f"layer {path!r} changes its buffers (running statistics) under "
                "torch.utils.checkpoint, which does so twice for every micro-batch",
                hint="take the checkpoint away, and plan with --recompute: statistics then move "
                "once",
            )


@contextmanager
def plain_checkpoints(in_layer: Callable[[], bool]) -> Iterator[Checkpoints]:
    """Outside layers, run what is checkpointed plainly."""
    reenter: Any = CheckpointFunction.apply
    checkpoints = Checkpoints()

    def apply(run: Callable[..., Any], preserve_state: bool, *args: Any) -> Any:
        if in_layer():
            return reenter(run, preserve_state, *args)
        # Where no input has a gradient it trains nothing, whatever parameters it uses.
        learns = any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
        checkpoints.num_entered += 1
        with nullcontext() if learns else torch.no_grad():
            result = run(*args)
        checkpoints.num_entered -= 1
        return result

    setattr(CheckpointFunction, "apply", staticmethod(apply))  # noqa: B010
    try:
        yield checkpoints
    finally:
        del CheckpointFunction.apply
