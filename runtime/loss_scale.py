"""The scale of the loss in float16.

This module knows its rule. It does not know what is multiplied by it, nor when.
"""

from dataclasses import dataclass

__all__ = ["LossScale"]

_FIRST_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000


@dataclass(slots=True)
class LossScale:
    """What float16's loss is multiplied by, so that small gradients do not vanish.

    torch.amp.GradScaler's rule with its own settings: half of it after a step with a gradient that
    is not finite, twice of it after 2000 steps in a row without one. It is a power of two, so
    dividing by it is exact.
    """

    scale: float = _FIRST_SCALE
    num_good_steps: int = 0
    """Since it changed last."""

    def follow(self, *, finite: bool) -> None:
        """After a step in which all gradients were finite, or not all."""
        self.num_good_steps = self.num_good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.num_good_steps == _GROWTH_INTERVAL:
            self.scale, self.num_good_steps = self.scale * 2, 0
