"""The small discrete choices: mesh, stages per rank, micro-batches, partition, recompute.

They are few, so they are enumerated, and each leaves one split problem. This module knows which
combinations exist for a batch and a number of devices. It does not know costs or memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planner.errors import UsageError
from planner.layouts import Grid, Layout
from planner.partitions import partition_text
from planner.solve.groups import partition_group_sizes
from planner.solve.problem import Constraints, Problem
from planner.solve.types import Split
from planner.words import counted

__all__ = [
    "Choice", "check_problem", "demands", "divisors", "mesh_groups", "stage_counts",
]  # fmt: skip

STAGES_PER_RANK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MAX_STAGES = 512
MAX_BATCHINGS_PER_MESH = 6
MAX_SIZES = 6


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Choice:
    """One setting of all discrete choices."""

    num_replicas: int
    num_pipeline_ranks: int
    stages_per_rank: int
    """Of the rank with most, where they differ."""
    micro_batch_size: int
    num_micro_batches: int
    partition: int
    recompute: bool | None
    """Of all stages, or of none; None: decided per stage, with the boundaries."""
    offload_state: bool = False
    offload_inputs: bool = False
    num_buffers: int = 2
    """Size of the pools of weight and of gradient buffers."""
    layout: Layout = Layout.REPLICAS_INSIDE
    assignment: tuple[int, ...] = ()
    """Pipeline rank of each stage; empty: stage s on rank s mod P, as many on every rank."""
    partition_group_size: int = 0
    """Replicas that divide the state among them; 0: all, or nothing is divided."""

    @property
    def num_parts(self) -> int:
        """Of the state; 1 where nothing is partitioned."""
        return self.grid.num_parts if self.partition else 1

    @property
    def num_stages(self) -> int:
        return len(self.assignment) or self.num_pipeline_ranks * self.stages_per_rank

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """Pipeline rank of each stage."""
        ranks = self.num_pipeline_ranks
        return self.assignment or tuple(stage % ranks for stage in range(self.num_stages))

    @property
    def grid(self) -> Grid:
        """Which world rank is which replica's which pipeline rank."""
        return Grid(
            num_replicas=self.num_replicas,
            num_pipeline_ranks=self.num_pipeline_ranks,
            layout=self.layout,
            partition_group_size=self.partition_group_size,
        )

    def split(self, boundaries: tuple[int, ...]) -> Split:
        """With these boundaries; no stage is recomputed unless the choice says so of all."""
        return Split(boundaries=boundaries, recompute=(self.recompute is True,) * self.num_stages)

    def describe(self) -> str:
        """In words, for messages."""
        stages = f"{counted(self.stages_per_rank, 'stage')} per rank"
        if self.assignment:
            stages = f"{self.num_stages} stages on ranks {', '.join(map(str, self.assignment))}"
        return (
            f"{counted(self.num_replicas, 'replica')} x "
            f"{counted(self.num_pipeline_ranks, 'pipeline rank')}, {stages}, "
            f"{counted(self.num_micro_batches, 'micro-batch', 'es')} of {self.micro_batch_size}, "
            f"partition {partition_text(self.partition, self.partition_group_size)}, "
            f"{_RECOMPUTES[self.recompute]}"
            + (", state offloaded" if self.offload_state else "")
            + (", inputs offloaded" if self.offload_inputs else "")
        )


_RECOMPUTES = {False: "no recompute", True: "with recompute", None: "recompute per stage"}


def check_problem(problem: Problem, num_layers: int) -> None:
    """Refuse what no placement can satisfy.

    Raises UsageError with the offending values and what to change.
    """
    wanted = problem.constraints
    for name, value in _demanded_counts(problem):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", hint=f"give {name} of at least 1")
    if problem.num_devices > problem.cluster.num_devices:
        raise UsageError(
            f"{problem.num_devices} devices demanded, but cluster {problem.cluster.name} has "
            f"{problem.cluster.num_devices}",
            hint=f"at most {problem.cluster.num_devices} devices, or a larger cluster",
        )
    mesh = (wanted.num_replicas or 1) * (wanted.num_pipeline_ranks or 1)
    if mesh > problem.num_devices:
        raise UsageError(
            f"{wanted.num_replicas or 1} replicas x {wanted.num_pipeline_ranks or 1} pipeline "
            f"ranks need {mesh} devices, but only {problem.num_devices} are to be used",
            hint=f"{mesh} devices, or fewer replicas or pipeline ranks",
        )
    ranks, stages = wanted.num_pipeline_ranks or 1, wanted.stages_per_rank or 1
    if ranks > num_layers:
        raise UsageError(
            f"{ranks} pipeline ranks demanded, but the model has {num_layers} layers",
            hint=f"at most {num_layers} pipeline ranks, or a finer list of layers",
        )
    if ranks * stages > num_layers:
        raise UsageError(
            f"{stages} stages per rank x {ranks} pipeline ranks = {ranks * stages} stages, but "
            f"the model has {num_layers} layers",
            hint=f"at most {num_layers // ranks} stages per rank",
        )
    if wanted.partition not in (None, 0, 1, 2, 3):
        raise UsageError(f"partition level {wanted.partition} is unknown", hint="0, 1, 2 or 3")
    within, replicas = wanted.partition_within, wanted.num_replicas
    if isinstance(within, int) and replicas is not None and replicas % within:
        raise UsageError(
            f"{counted(replicas, 'replica')} do not divide into partition groups of {within}",
            hint=f"groups of a divisor of {replicas}, or another number of replicas",
        )
    _check_batch(problem)


def _demanded_counts(problem: Problem) -> tuple[tuple[str, int | None], ...]:
    wanted, within = problem.constraints, problem.constraints.partition_within
    return (
        ("the number of devices", problem.num_devices),
        ("the global batch size", problem.global_batch_size),
        ("the number of replicas", wanted.num_replicas),
        ("the number of pipeline ranks", wanted.num_pipeline_ranks),
        ("the number of stages per rank", wanted.stages_per_rank),
        ("the micro-batch size", wanted.micro_batch_size),
        ("the number of micro-batches", wanted.num_micro_batches),
        ("the number of buffers", wanted.num_buffers),
        ("the size of partition groups", within if isinstance(within, int) else None),
    )


def _check_batch(problem: Problem) -> None:
    wanted, batch = problem.constraints, problem.global_batch_size
    factors = {
        "replicas": wanted.num_replicas,
        "micro-batch size": wanted.micro_batch_size,
        "micro-batches": wanted.num_micro_batches,
    }
    demanded = {name: value for name, value in factors.items() if value is not None}
    product = 1
    for value in demanded.values():
        product *= value
    complete = len(demanded) == len(factors)
    if (batch % product) if not complete else (batch != product):
        terms = " x ".join(f"{name} {value}" for name, value in demanded.items())
        multiple = max(1, round(batch / product)) * product if not complete else product
        relation = "is not equal to" if complete else "is not divisible by"
        raise UsageError(
            f"the global batch of {batch} samples {relation} {terms}"
            + (f" = {product}" if len(demanded) > 1 else ""),
            hint=f"a global batch of {multiple}, or leave one of the factors free",
        )


def mesh_groups(
    problem: Problem, num_layers: int, *, accepts: Callable[[int], bool]
) -> Iterator[tuple[Choice, ...]]:
    """Choices grouped by the number of devices they use, most devices first; none empty.

    Micro-batch sizes that the model does not accept are listed, but take no other size's place.

    Raises UsageError if there is no choice at all.
    """
    found = False
    for used in range(problem.num_devices, 0, -1):
        sizes = _micro_batch_sizes(problem, used, num_layers, accepts)
        choices = tuple(
            choice
            for mesh in _meshes(problem.constraints, used, num_layers)
            for choice in _choices_of_mesh(problem, mesh, num_layers, sizes)
        )
        if choices:
            found = True
            yield choices
    if not found:
        raise UsageError(
            f"no mesh of up to {problem.num_devices} devices serves a global batch of "
            f"{problem.global_batch_size} samples with {demands(problem.constraints)}",
            hint="leave one of these choices free (a partitioned state needs two replicas "
            "that divide it)",
        )


def demands(wanted: Constraints) -> str:
    """What the user fixed, in words."""
    fixed = {name: getattr(wanted, name) for name in Constraints.__dataclass_fields__}
    given = [f"{name.replace('_', ' ')} {v}" for name, v in fixed.items() if v is not None]
    return ", ".join(given) or "nothing demanded"


def _meshes(wanted: Constraints, used: int, num_layers: int) -> Iterator[tuple[int, int]]:
    for ranks in range(1, min(used, num_layers) + 1):
        replicas, rest = divmod(used, ranks)
        if (
            rest == 0
            and wanted.num_replicas in (None, replicas)
            and wanted.num_pipeline_ranks in (None, ranks)
        ):
            yield replicas, ranks


def _batchings(problem: Problem, replicas: int, ranks: int) -> list[tuple[int, int]]:
    """(size, count) of the micro-batches: counts near P and P + 1, their multiples, extremes."""
    wanted = problem.constraints
    per_replica, rest = divmod(problem.global_batch_size, replicas)
    if rest:
        return []
    counts = [
        count
        for count in divisors(per_replica)
        if wanted.num_micro_batches in (None, count)
        and wanted.micro_batch_size in (None, per_replica // count)
    ]
    targets = (ranks, ranks + 1, 2 * ranks, 4 * ranks, (ranks + 1) // 2, 8 * ranks, per_replica)
    nearest = (
        min(counts, key=lambda count: max(count / target, target / count))
        for target in targets
        if counts
    )
    chosen = list(dict.fromkeys(nearest))[:MAX_BATCHINGS_PER_MESH]
    return [(per_replica // count, count) for count in chosen]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _micro_batch_sizes(
    problem: Problem, used: int, num_layers: int, accepts: Callable[[int], bool]
) -> tuple[int, ...]:
    """Micro-batch sizes worth profiling, most often wanted first, and the smallest.

    Every size costs a profile of the model, so their number is capped. The smallest is the one
    that fits memory when nothing else does.
    """
    votes: dict[int, float] = {}
    for replicas, ranks in _meshes(problem.constraints, used, num_layers):
        for position, (size, _) in enumerate(_batchings(problem, replicas, ranks)):
            votes[size] = votes.get(size, 0.0) + 1.0 / (1 + position)
    sizes: list[int] = []
    num_accepted = 0
    for size in sorted(votes, key=lambda size: (-votes[size], size)):
        if num_accepted < MAX_SIZES - 1:
            sizes.append(size)
            num_accepted += accepts(size)
    for size in sorted(votes):
        sizes.append(size)
        if accepts(size):
            break
    return tuple(dict.fromkeys(sizes))


def stage_counts(wanted: Constraints, ranks: int, num_layers: int) -> list[int]:
    """Stages per rank that are worth a try, ascending."""
    longest = min(num_layers, MAX_STAGES) // ranks
    if wanted.stages_per_rank is not None:
        return [wanted.stages_per_rank] if wanted.stages_per_rank * ranks <= num_layers else []
    return sorted({count for count in (*STAGES_PER_RANK, longest) if 0 < count <= longest})


def _choices_of_mesh(
    problem: Problem, mesh: tuple[int, int], num_layers: int, sizes: tuple[int, ...]
) -> Iterator[Choice]:
    (replicas, ranks), wanted = mesh, problem.constraints
    stages = stage_counts(wanted, ranks, num_layers)
    grid = Grid(num_replicas=replicas, num_pipeline_ranks=ranks)
    group_sizes = partition_group_sizes(problem, grid)
    partitions = [0, 3] if group_sizes else [0]
    if wanted.partition is not None:
        partitions = [wanted.partition] if group_sizes or not wanted.partition else []
    if wanted.update_on_host:
        partitions = [p for p in partitions if wanted.allows(p, offload_state=True)]
    recomputes = [False, True] if wanted.recompute is None else [wanted.recompute]
    for (size, count), stages_per_rank, partition, recompute in itertools.product(
        _batchings(problem, replicas, ranks), stages, partitions, recomputes
    ):
        if size in sizes:
            yield Choice(
                num_replicas=replicas,
                num_pipeline_ranks=ranks,
                stages_per_rank=stages_per_rank,
                micro_batch_size=size,
                num_micro_batches=count,
                partition=partition,
                recompute=recompute,
                offload_state=wanted.offload_state or wanted.update_on_host or False,
                offload_inputs=wanted.offload_inputs or False,
                num_buffers=wanted.num_buffers or 2,
                partition_group_size=group_sizes[0] if partition else 0,
            )
