"""What a choice comes to under a schedule, as a function of its split: time and memory, estimated.

Time is the longest path through the order's compute. Memory is linear in the micro-batches that a
rank holds at once, so the solver's memory model at one micro-batch and at all of them tells of any
number between; what a simulation finds beyond it is counted from then on. This module knows one
choice. It does not know which choices there are, nor the simulator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.explain.order_time import OrderTime, steps_of
from planner.layouts import Layout
from planner.schedules import Schedule
from planner.solve import Placement
from planner.solve.build import Builder
from planner.solve.choices import Choice
from planner.solve.entry import placement_of
from planner.solve.instance import (
    Cuts,
    Flags,
    Instance,
    rank_units_of_many,
    stage_ticks,
    step_ticks,
    step_ticks_of_many,
)
from planner.solve.recompute import choose_recompute
from planner.solve.splits import (
    Key,
    arrays,
    balanced_split,
    balanced_stages,
    greedy_split,
    improve,
    keys_of_figures,
    neighbours,
    uniform_split,
)
from planner.solve.types import Split

__all__ = ["OrderModel", "model_of", "num_held", "quick_seconds"]

MEMORY_TOLERANCE = 1.1
"""Of the estimate of memory, before any simulation: what is beyond it is not simulated."""
MAX_EVALUATIONS = 2000
"""Splits that a local search looks at."""
ZERO_BUBBLE_FILL = 1 / 3
"""Of the wait that other orders have while the pipeline fills and drains (Qi et al., 2024)."""
MAX_STEPS = 20_000
"""Compute steps of orders whose time is asked for; longer ones are shortened, and where that is not
enough, the layered order's time stands for theirs."""


@dataclass(frozen=True, kw_only=True)
class OrderModel:
    """One choice under one schedule."""

    instance: Instance
    """With all micro-batches, and the limits of memory."""
    one: Instance
    """With one micro-batch."""
    schedule: Schedule
    group_size: int
    """Of the hybrid schedule, 0 for others."""
    peak_ratios: tuple[float, ...]
    """Per rank: its simulated peak over the estimated one."""

    @property
    def choice(self) -> Choice:
        return self.instance.choice

    def placement(self, split: Split) -> Placement:
        """The choice with a split, under the schedule."""
        placement = placement_of(self.choice, split)
        return replace(placement, schedule=self.schedule, group_size=self.group_size)

    def seconds(self, split: Split) -> float:
        """Estimated step."""
        ticks: float = self._ticks_of_many(*arrays([split]))[0]
        return ticks * self.instance.tick_seconds

    def excess_bytes(self, split: Split) -> list[int]:
        """By pipeline rank: estimated memory beyond the limit; negative where there is room."""
        units = self._units_of_many(*arrays([split]))[0]
        pairs = zip(units, self.instance.limit_units, strict=True)
        return [round((used - most) * self.instance.unit_bytes) for used, most in pairs]

    def quick_seconds(self) -> float:
        """As `quick_seconds`, and what memory makes a balanced split recompute, which better splits
        deal out to all ranks."""
        cuts = balanced_stages(_work_before(self.instance, again=False))
        split = choose_recompute(self.instance, cuts, self._units_of_many)
        kept = replace(split, recompute=(False,) * len(split.recompute))
        again = sum(stage.rebuild for stage in stage_ticks(self.instance, split))
        turn = again * self.instance.tick_seconds / self.choice.num_pipeline_ranks
        seconds: float = _seconds_without_order(self.instance, self.schedule, kept)
        return seconds + float(self.choice.num_micro_batches * turn)

    def simple_split(self, *others: Split) -> tuple[Split, float]:
        """The best of some simple splits and of others, and its estimated step. It may not fit."""
        starts = [*others, *self._starts()]
        keys = self._keys_of_many(*arrays(starts))
        best = min(range(len(starts)), key=keys.__getitem__)
        _, _, ticks, _ = keys[best]
        return starts[best], ticks * self.instance.tick_seconds

    def improved(self, split: Split) -> Split:
        """After a local search, which makes what does not fit smaller first."""
        return improve(self.instance, split, MAX_EVALUATIONS, self._keys_of_many)

    def near(self, split: Split, factor: float) -> list[Split]:
        """Splits that differ from this one in a single move and fit, the fastest first; those only
        whose estimate is at most so many times this one's."""
        others = neighbours(self.instance, split)
        if not others:
            return []
        keys = self._keys_of_many(*arrays([split, *others]))
        (_, _, ticks, _), *keys = keys
        order = sorted(range(len(others)), key=keys.__getitem__)
        return [others[at] for at in order if not keys[at][0] and keys[at][2] <= factor * ticks]

    def corrected(self, split: Split, peak_bytes: Sequence[int]) -> "OrderModel":
        """With what the simulator says of the split's memory."""
        units = self._units_of_many(*arrays([split]))[0]
        ratios = tuple(
            float(ratio * peak / (estimate * self.instance.unit_bytes))
            for ratio, peak, estimate in zip(self.peak_ratios, peak_bytes, units, strict=True)
        )
        return replace(self, peak_ratios=ratios)

    def _starts(self) -> list[Split]:
        instance, stages = self.instance, self.choice.num_stages
        found = {
            balanced_split(instance.kept, stages),
            balanced_stages(_work_before(instance, again=False)),
            balanced_stages(_work_before(instance, again=True)),
            greedy_split(instance.time, stages),
            uniform_split(instance.num_layers, stages),
        }
        return [choose_recompute(instance, cuts, self._units_of_many) for cuts in sorted(found)]

    def _keys_of_many(self, cuts: Cuts, recompute: Flags) -> list[Key]:
        units = self._units_of_many(cuts, recompute)
        return keys_of_figures(self.instance, cuts, units, self._ticks_of_many(cuts, recompute))

    def _units_of_many(self, cuts: Cuts, recompute: Flags) -> Cuts:
        least, slope = self._one_and_more(cuts, recompute)
        units = least + (self._held - 1) * slope
        if self.schedule is Schedule.ZERO_BUBBLE and recompute.any():
            # What has been rebuilt stays for the second half of backward, which comes later.
            _, whole = self._one_and_more(cuts, np.zeros_like(recompute))
            ranks = np.arange(self.choice.num_pipeline_ranks)
            units = units + np.minimum(ranks, self._num_more) * (whole - slope)
        found: Cuts = units * np.array(self.peak_ratios)
        return found

    def _one_and_more(self, cuts: Cuts, recompute: Flags) -> tuple[Cuts, NDArray[np.float64]]:
        """Units of memory with one micro-batch, and of each more that is held."""
        least = rank_units_of_many(self.one, cuts, recompute)
        most = rank_units_of_many(self.instance, cuts, recompute)
        return least, (most - least) / self._num_more

    @property
    def _num_more(self) -> int:
        """Micro-batches beyond the first; 1 where there are none."""
        return max(1, self.choice.num_micro_batches - 1)

    @cached_property
    def _held(self) -> NDArray[np.float64]:
        """By pipeline rank."""
        ranks = range(self.choice.num_pipeline_ranks)
        return np.array([num_held(self.schedule, self.choice, self.group_size, r) for r in ranks])

    def _ticks_of_many(self, cuts: Cuts, recompute: Flags) -> Cuts:
        if self._time is None:
            return step_ticks_of_many(self.instance, cuts, recompute)
        return self._time.ticks_of_many(cuts, recompute)

    @cached_property
    def _time(self) -> OrderTime | None:
        """None where compute says little (one rank, whose weights come and go with every
        micro-batch) or is too long an order."""
        choice = self.choice
        if choice.num_pipeline_ranks == 1:
            return None
        count = _enough_micro_batches(self)
        if choice.num_stages * count > MAX_STEPS:
            return None
        again = Split(
            boundaries=(0,) * (choice.num_stages + 1), recompute=(True,) * choice.num_stages
        )
        # What the order does not depend on is alike, so that orders are walked once.
        placement = replace(
            self.placement(again), num_micro_batches=count, num_replicas=1, micro_batch_size=1,
            partition=0, partition_group_size=0, layout=Layout.REPLICAS_INSIDE,
        )  # fmt: skip
        return OrderTime(self.instance, steps_of(placement), choice.num_micro_batches - count)


def model_of(
    builder: Builder,
    choice: Choice,
    schedule: Schedule,
    group_size: int,
    peak_ratios: tuple[float, ...] = (),
) -> OrderModel:
    """Of a choice under a schedule."""
    return OrderModel(
        instance=builder.instance(choice),
        one=builder.instance(replace(choice, num_micro_batches=1)),
        schedule=schedule,
        group_size=group_size,
        peak_ratios=peak_ratios or (1 / MEMORY_TOLERANCE,) * choice.num_pipeline_ranks,
    )


def quick_seconds(instance: Instance, schedule: Schedule) -> float:
    """A first estimate of the step, as if nothing were recomputed unless all is."""
    choice = instance.choice
    cuts = balanced_stages(_work_before(instance, again=bool(choice.recompute)))
    return _seconds_without_order(instance, schedule, choice.split(cuts))


def _seconds_without_order(instance: Instance, schedule: Schedule, split: Split) -> float:
    """The busiest rank's work on all micro-batches, the others' on one, in which it waits, and what
    its first gather and the last reductions take beside it."""
    choice = instance.choice
    own, count = instance.pace.own, choice.num_micro_batches
    if choice.num_pipeline_ranks == 1:
        return step_ticks(instance, split) * instance.tick_seconds
    stages = stage_ticks(instance, split)
    each = [stage.forward + stage.rebuild + stage.backward for stage in stages]
    work = [sum(each[stage] for stage in stages_of_rank) for stages_of_rank in own]
    fill = (sum(work) - max(work)) / choice.stages_per_rank
    if schedule is Schedule.ZERO_BUBBLE:
        fill *= ZERO_BUBBLE_FILL
    ends = []
    for stages_of_rank, turn in zip(own, work, strict=True):
        first, mine = stages[stages_of_rank[0]], [stages[stage] for stage in stages_of_rank]
        late = sum(stage.backward for stage in mine) * min(count, choice.num_pipeline_ranks)
        exposed = max(first.reduce, sum(stage.reduce for stage in mine) - late)
        sent = max(sum(stage.arrival for stage in mine), sum(s.gradient_arrival for s in mine))
        ends.append(first.gather + count * max(turn, sent) + exposed + first.update)
    seconds: float = (max(ends) + fill) * instance.tick_seconds
    return seconds


def num_held(schedule: Schedule, choice: Choice, group_size: int, rank: int) -> float:
    """Micro-batches, through all of a rank's stages, whose activations it holds at once."""
    ranks, loops, count = (
        choice.num_pipeline_ranks, choice.stages_per_rank, choice.num_micro_batches
    )  # fmt: skip
    match schedule:
        case Schedule.PLAIN:
            held = 1.0
        case Schedule.ONE_F_ONE_B:
            held = ranks - rank
        case Schedule.ZERO_BUBBLE:
            held = ranks
        case Schedule.INTERLEAVED | Schedule.HYBRID:
            group = group_size or ranks
            held = (2 * (ranks - rank - 1) + (loops - 1) * group + 1) / loops
        case _:
            held = count
    return max(1.0, min(held, count))


def _enough_micro_batches(model: OrderModel) -> int:
    """So many that every rank has come to a steady pace; the hybrid schedule's groups are whole."""
    choice = model.choice
    if model.schedule is Schedule.HYBRID:
        return choice.num_micro_batches
    return min(choice.num_micro_batches, 2 * choice.num_pipeline_ranks)


def _work_before(instance: Instance, *, again: bool) -> list[tuple[int, ...]]:
    """Per stage: prefix sum over the layers of one micro-batch's compute on the stage's rank."""
    names = ("forward", "backward", "again")[: 3 if again else 2]
    of_kind = {
        id(kind): tuple(map(sum, zip(*(getattr(kind, name).prefix for name in names), strict=True)))
        for kind in instance.kinds
    }
    return [of_kind[id(kind)] for kind in instance.tables]
