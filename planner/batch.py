"""How many samples a step takes, and what a whole training then takes in hours and money.

Knows the law of critical batch sizes, which numbers are worth trying in a range, and the sums from
steps to cost. Does not know how a plan is found: it asks `planner.pipeline` for one per batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from planner.errors import InfeasibleError, UsageError
from planner.explain.changes import ClusterAt
from planner.explain.remedies import with_remedies
from planner.graph import LayerGraph
from planner.pipeline import PlanResult, find_plan
from planner.prepare import Prepared
from planner.solve import Constraints, Progress

__all__ = [
    "BatchRange",
    "Training",
    "Tried",
    "best_batch",
    "critical_batch_samples",
    "critical_batch_size",
    "critical_batch_tokens",
    "sizes_in",
    "tokens_per_sample",
]

_PER_OCTAVE = 4
_INTEGERS = ("int32", "int64")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRange:
    """Global batch sizes to choose from, both ends included."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long to train: one of the three, and the price of a device."""

    num_steps: int | None = None
    num_samples: float | None = None
    num_tokens: float | None = None
    price_per_hour: float | None = None
    """Of one device."""

    @property
    def is_given(self) -> bool:
        return not (self.num_steps is self.num_samples is self.num_tokens is None)

    def steps_with(self, global_batch_size: int, sample_tokens: int | None) -> int:
        """Optimizer steps, the last one whole.

        `sample_tokens` is the number of tokens in a sample.

        Raises:
            UsageError: tokens are asked for, and the model has none.
        """
        if self.num_steps is not None:
            return self.num_steps
        samples = self.num_samples or 0.0
        if self.num_tokens is not None:
            samples = self.num_tokens / _known_tokens(sample_tokens, "--tokens")
        return math.ceil(samples / global_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One batch size of a range, and what came of it."""

    global_batch_size: int
    result: PlanResult | None
    reason: str = ""
    """Why there is no plan."""

    @property
    def sample_seconds(self) -> float:
        """Step time per sample; infinite without a plan."""
        if self.result is None:
            return math.inf
        return self.result.solution.step_seconds / self.global_batch_size


def critical_batch_tokens(num_parameters: int) -> float:
    """Tokens per step beyond which a larger batch hardly shortens a training.

    1312 (N / 12)^(1/3) for N parameters. This is our calculation from the scaling that "Layered
    gradient accumulation and modular pipeline parallelism" (Lamy-Poirier, arXiv 2106.02679) uses
    for its family of transformers: model X_x has x layers of width x^2, sequences of 16 x tokens
    and 12 x^5 parameters, and a critical batch of 82 x^(2/3) sequences. So a batch has
    82 x^(2/3) * 16 x = 1312 x^(5/3) tokens, and x = (N / 12)^(1/5).

    The limits of the law: it is a trend over dense transformers that are trained on text to the
    end; a critical batch grows with the progress of the training, differs between data sets and
    optimizers, and says nothing of other kinds of model. With experts, count the parameters that a
    token meets. It is a size to begin with, to be settled by the loss of real runs.
    """
    return 1312.0 * math.cbrt(num_parameters / 12)


def critical_batch_samples(graph: LayerGraph) -> float:
    """The law's batch in samples of the model's own length.

    Raises:
        UsageError: the model has no tokens.
    """
    tokens = _known_tokens(tokens_per_sample(graph), "--critical-batch")
    parameters = sum(parameter.num_elements for parameter in graph.parameters)
    return critical_batch_tokens(parameters) / tokens


def critical_batch_size(graph: LayerGraph, num_devices: int, constraints: Constraints) -> int:
    """The same, rounded down to what divides well.

    Raises:
        UsageError: the model has no tokens, or what is demanded needs a larger batch.
    """
    samples = math.floor(critical_batch_samples(graph))
    unit = _demanded_product(constraints)
    if samples < unit:
        raise UsageError(
            f"the critical batch of {graph.model_name} is {samples} samples, less than the {unit} "
            "that the other options need",
            hint=f"--global-batch {unit}, or fewer replicas or micro-batches, or smaller ones",
        )
    return _round_sizes(BatchRange(least=unit, most=samples), num_devices, constraints)[-1]


def tokens_per_sample(graph: LayerGraph) -> int | None:
    """Length of the longest sequence of whole numbers in a sample; None where there is none."""
    lengths = [
        spec.shape[1] for spec in graph.batch if spec.dtype in _INTEGERS and len(spec.shape) == 2
    ]
    return max(lengths, default=None)


def sizes_in(wanted: BatchRange, num_devices: int, constraints: Constraints) -> list[int]:
    """Batch sizes of a range that divide well: four per octave, ascending.

    Raises:
        UsageError: none of them is a multiple of what is demanded.
    """
    unit = _demanded_product(constraints)
    if wanted.most // unit * unit < wanted.least:
        raise UsageError(
            f"no global batch of {wanted.least}..{wanted.most} samples is a multiple of {unit}, "
            "the product of the replicas, micro-batches and micro-batch size demanded",
            hint=f"a range with {max(1, wanted.most // unit) * unit} in it, or leave one of them "
            "free",
        )
    return _round_sizes(wanted, num_devices, constraints)


def _round_sizes(wanted: BatchRange, num_devices: int, constraints: Constraints) -> list[int]:
    """Multiples of all devices where the range has some, else of what is demanded; not empty."""
    unit = _demanded_product(constraints)
    all_devices = math.lcm(unit, num_devices) if constraints.num_replicas is None else unit
    for base in (all_devices, unit):
        found = [n * base for n in _round_numbers(wanted.most // base) if n * base >= wanted.least]
        if found:
            return found
    return [wanted.most // unit * unit]


def _round_numbers(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four per octave, with many divisors."""
    number = step = 1
    while number <= most:
        yield number
        if number == 2 * _PER_OCTAVE * step:
            step *= 2
        number += step


def _demanded_product(wanted: Constraints) -> int:
    """What every global batch is a multiple of."""
    factors = (wanted.num_replicas, wanted.num_micro_batches, wanted.micro_batch_size)
    return math.prod(factor or 1 for factor in factors)


def _known_tokens(sample_tokens: int | None, option: str) -> int:
    if sample_tokens is None:
        raise UsageError(
            f"{option} counts tokens, but no input of the model is a sequence of whole numbers",
            hint="give --samples, and --global-batch in samples",
        )
    return sample_tokens


def best_batch(
    prepared: Prepared,
    sizes: Iterable[int],
    progress_of: Callable[[int], Progress | None] = lambda _: None,
    *,
    cluster_at: ClusterAt | None = None,
) -> tuple[PlanResult, tuple[Tried, ...]]:
    """The plan with the least time per sample, and all that were made; the smaller batch of equals.

    `progress_of` a batch size hears of the search for its plan. More devices, for advice where
    nothing fits, come from `cluster_at`.

    Raises:
        UsageError, InfeasibleError: no size has a plan; the reason of the smallest, and if it is
            that nothing fits, what would make it fit.
    """
    tried = []
    error: UsageError | InfeasibleError | None = None
    for size in sizes:
        try:
            result = find_plan(prepared.with_batch(size), progress_of(size), advise=False)
            tried.append(Tried(global_batch_size=size, result=result))
        except (UsageError, InfeasibleError) as reason:
            error = error or reason
            tried.append(Tried(global_batch_size=size, result=None, reason=reason.message))
    best = min(tried, key=lambda one: one.sample_seconds)
    if best.result is None:
        assert error is not None
        if isinstance(error, UsageError):
            raise error
        least = prepared.with_batch(min(one.global_batch_size for one in tried))
        raise with_remedies(
            error,
            least.problem,
            least.planner_for,
            cluster_at=cluster_at,
            time_limit_seconds=least.problem.time_limit_seconds,
        )
    return best.result, tuple(tried)
