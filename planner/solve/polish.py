"""Better splits of the choices that look best: a local search, their neighbours, then CP-SAT.

The search has tried each choice with quick splits and a few numbers of stages. Here what is near
the best gets a local search; from the best few it goes on to the next numbers of stages and of
buffers while that pays; and CP-SAT has the last word on those. Nothing here asks the simulator.
This module knows trials and the clock. It does not know which meshes there are.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planner.solve.choices import Choice
from planner.solve.entry import Clock
from planner.solve.problem import Constraints
from planner.solve.refine import refine
from planner.solve.shake import search_nearby, shake
from planner.solve.space import Batching
from planner.solve.trial import Trial

__all__ = ["Polish", "neighbours"]

NEAR = 1.05
"""The local search takes off up to so much; what is further from the best stays as it is."""
MAX_CLIMBS = 3
MAX_REFINED = 2
SHAKES = ((6, 24), (3, 48), (2, 48))
"""How many choices get how many more local searches: fewer and fewer, as their best is known."""
FEW_STAGES = 16
"""With more, fewer local searches: each tries more moves, and each move takes longer."""
MAX_STEPS = 12
"""From one number of stages or buffers to the next, of each climb."""
LOCAL_SHARE = 1 / 4
"""Of the time limit: left for CP-SAT and the simulator when the local search ends."""
REFINE_SHARE = 1 / 20
"""Of the time limit: for CP-SAT on each choice."""
MAX_BUFFERS = 3


@dataclass(kw_only=True)
class Polish:
    """Improves the splits of trials, and adds trials of neighbours."""

    trials: list[Trial]
    try_choice: Callable[[Choice, float], Trial]
    """A choice and a bound of it -> a trial with a quick split."""
    wanted: Constraints
    num_layers: int
    clock: Clock
    seed: int

    def search_locally(self) -> None:
        """A local search of whatever is near the best, and of the neighbours of the best few."""
        worth = self.ranked()
        for trial in worth:
            if self._is_over() or trial.objective_seconds > worth[0].objective_seconds * NEAR:
                break
            search_nearby(trial)
        for trial in self.leaders()[:MAX_CLIMBS]:
            self._climb(trial)

    def search_on(self) -> None:
        """More local searches for the best of a few meshes and batchings, then CP-SAT."""
        generator = random.Random(self.seed)
        for number, repeats in SHAKES:
            for trial in self.leaders()[:number]:
                stages = max(FEW_STAGES, trial.instance.choice.num_stages)
                for _ in range(max(1, repeats * FEW_STAGES**2 // stages**2)):
                    if self._is_over() or not self._may_win(trial):
                        break
                    shake(trial, generator)
        seconds = self.clock.limit_seconds * REFINE_SHARE
        for trial in self.leaders()[:MAX_REFINED]:
            if self.clock.left > seconds and self._may_win(trial):
                refine(trial, seconds, self.seed)

    def ranked(self) -> list[Trial]:
        """All trials with a split, the fastest first by the step-time model."""
        fitting = (trial for trial in self.trials if trial.split is not None)
        return sorted(fitting, key=lambda trial: trial.objective_seconds)

    def leaders(self) -> list[Trial]:
        """Of those, the first of each mesh and batching."""
        found = dict[Batching, Trial]()
        for trial in self.ranked():
            found.setdefault(_batching(trial.instance.choice), trial)
        return list(found.values())

    def _may_win(self, trial: Trial) -> bool:
        return trial.bound_seconds < self.ranked()[0].objective_seconds

    def _is_over(self) -> bool:
        return self.clock.left < self.clock.limit_seconds * LOCAL_SHARE

    def _climb(self, trial: Trial) -> None:
        """To the best neighbour and on from there, while there is a better one."""
        for _ in range(MAX_STEPS):
            known = {other.instance.choice for other in self.trials}
            found = []
            for choice in neighbours(trial.instance.choice, self.wanted, self.num_layers):
                if self._is_over():
                    return
                if choice not in known:
                    other = self.try_choice(choice, trial.bound_seconds)
                    search_nearby(other)
                    found.append(other)
            self.trials += found
            best = min(found, key=lambda other: other.objective_seconds, default=trial)
            if best.objective_seconds >= trial.objective_seconds:
                return
            trial = best


def _batching(choice: Choice) -> Batching:
    return Batching(
        num_replicas=choice.num_replicas,
        num_pipeline_ranks=choice.num_pipeline_ranks,
        micro_batch_size=choice.micro_batch_size,
        num_micro_batches=choice.num_micro_batches,
    )


def neighbours(choice: Choice, wanted: Constraints, num_layers: int) -> Iterator[Choice]:
    """The choice with a few stages per rank more or less, or with other buffers."""
    most = num_layers // choice.num_pipeline_ranks
    for number in (choice.stages_per_rank + more for more in (1, -1, 2, -2)):
        if wanted.stages_per_rank is None and 0 < number <= most:
            yield dataclasses.replace(choice, stages_per_rank=number)
    for number in (choice.num_buffers + more for more in (1, -1)):
        if wanted.num_buffers is None and 0 < number <= MAX_BUFFERS:
            yield dataclasses.replace(choice, num_buffers=number)
