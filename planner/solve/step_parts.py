"""What shapes the paths through a step: what each stage takes, and the counts of a choice.

This module knows the quantities. It does not know how they combine: see `planner.solve.pace`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

__all__ = ["LOOKAHEAD", "STAGE_COLUMNS", "Pace", "StageTicks", "Ticks"]

LOOKAHEAD = 2
"""Compute steps by which transfers and copies are ahead of what reads them."""

Ticks = Any
"""A number of ticks, an array of them, or a linear expression whose value is one."""


class StageTicks(NamedTuple):
    """What one stage takes."""

    forward: Ticks
    """One micro-batch."""
    rebuild: Ticks
    """One micro-batch forward again before its backward; it need not wait for gradients."""
    backward: Ticks
    """One micro-batch."""
    arrival: Ticks
    """To receive a micro-batch from the stage before (0 for the first stage)."""
    gradient_arrival: Ticks
    """For the stage before to receive the gradients back."""
    gather: Ticks
    """Of its weights, before a pass."""
    reduce: Ticks
    update: Ticks
    gather_updated: Ticks = 0
    """Of its weights, after the update of each replica's part."""
    load: Ticks = 0
    """To bring one micro-batch's batch keys to the device, before its forward."""
    inputs: Ticks = 0
    """To bring one micro-batch's stored inputs to host memory, or back."""
    shard: Ticks = 0
    """To bring its shard of the weights to the device, or back."""
    moments: Ticks = 0
    """The same for the optimizer's state; where it is updated on the host, to bring the gradient
    there."""
    read: Ticks = 0
    """Of its gradients, to judge them before any update."""
    sending: Ticks = 0
    """Of all its micro-batches: host time to issue transfers between one forward and the next."""
    returning: Ticks = 0
    """The same for gradients, in backward."""


STAGE_COLUMNS = StageTicks._fields[5:]
"""What a stage takes beside its compute and its transfers."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Counts that shape the paths."""

    stage_ranks: tuple[int, ...]
    num_ranks: int
    num_micro_batches: int
    num_buffers: int
    """Size of the pools of weight and of gradient buffers."""
    gathers: bool
    """The weights are gathered before use."""
    reduces: bool
    """The gradients are reduced over replicas."""
    gathers_updated: bool = False
    """Each replica updates a part of weights that all keep whole."""
    updates_wait: bool = False
    """All updates stand at the end of the step."""
    offloads_state: bool = False
    updates_on_host: bool = False
    """State stays there, and updates run beside compute."""
    offloads_inputs: bool = False
    loads: bool = False
    """Batch keys take time on their way to the device."""
    issue: int = 0
    """Ticks that a host takes at least to issue an instruction."""
    num_verdicts: int = 0
    """How often all gradients are judged before the updates."""
    verdict: int = 0
    """Ticks in which all ranks hear of it."""
    tied_ranks: tuple[int, ...] = ()
    """Those that end the step by adding up gradients of tied weights."""
    tied: int = 0
    """Ticks to add them up."""
    tied_update: int = 0
    """Ticks to update the weights then."""

    @cached_property
    def used(self) -> frozenset[str]:
        """Those of STAGE_COLUMNS that play a part."""
        plays = {
            "gather": self.gathers,
            "reduce": self.reduces,
            "update": True,
            "gather_updated": self.gathers_updated,
            "load": self.loads,
            "inputs": self.offloads_inputs,
            "shard": self.offloads_state,
            "moments": self.offloads_state,
            "read": self.updates_wait,
            "sending": self.issue > 0,
            "returning": self.issue > 0,
        }
        return frozenset(name for name, is_used in plays.items() if is_used)

    @property
    def fetches_state(self) -> bool:
        """For updates on the device."""
        return self.offloads_state and not self.updates_on_host

    @cached_property
    def updates_early(self) -> bool:
        """So that the gather of the updated weights has its turn before the next reduction."""
        return self.gathers_updated and not self.updates_wait and self.num_micro_batches > 1

    @cached_property
    def own(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.stage_ranks):
            found[rank].append(stage)
        return tuple(map(tuple, found))

    @cached_property
    def is_modular(self) -> bool:
        """Whether stage s is on rank s mod P, and every rank has as many."""
        num_stages = len(self.stage_ranks)
        modular = tuple(stage % self.num_ranks for stage in range(num_stages))
        return self.stage_ranks == modular and num_stages % self.num_ranks == 0

    def _shifted(self, distance: int) -> tuple[int, ...]:
        """Per stage: the one so many places further among its rank's; -1 where there is none."""
        found = [-1] * len(self.stage_ranks)
        for own in self.own:
            for position, stage in enumerate(own):
                other = position + distance
                found[stage] = own[other] if 0 <= other < len(own) else -1
        return tuple(found)

    @cached_property
    def following(self) -> tuple[int, ...]:
        """Per stage: the rank's next one."""
        return self._shifted(1)

    @cached_property
    def preceding(self) -> tuple[int, ...]:
        return self._shifted(-1)

    @cached_property
    def takes_over(self) -> tuple[int, ...]:
        """Per stage: the one that has its weight buffer after it in forward."""
        return self._shifted(self.num_buffers)

    @cached_property
    def takes_back(self) -> tuple[int, ...]:
        """Per stage: the one that has its weight buffer after it in backward."""
        return self._shifted(-self.num_buffers)
