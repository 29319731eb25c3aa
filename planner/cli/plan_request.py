"""What one `lga-plan` command asks for, and which of its demands contradict each other.

Knows the options' values. Does not know what a model or a cluster says to them.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.batch import BatchRange, Training
from planner.cluster import Cluster
from planner.errors import UsageError
from planner.report import bytes_text, parse_bytes
from planner.schedules import OrderSearch, Schedule
from planner.solve import Constraints

__all__ = ["PlanRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The options, by the names that click gives them."""

    model: str
    gpus: int
    cluster: str | None
    profile: Path | None
    sequence_length: int | None
    global_batch: BatchRange | None
    critical_batch: bool
    num_steps: int | None
    num_tokens: float | None
    num_samples: float | None
    price: float | None
    micro_batch_size: int | None
    micro_batches: int | None
    replicas: int | None
    pipeline_ranks: int | None
    stages_per_rank: int | None
    assignment: str
    schedule: str
    partition: str | None
    partition_within: int | Literal["host"] | None
    recompute: bool | None
    offload_state: bool | None
    offload_inputs: bool | None
    num_buffers: int | None
    memory_limit: str | None
    clip_norm: float | None
    clip_delayed: bool
    check_finite: bool
    update_on: str
    precision: str
    keep_float32: tuple[str, ...]
    time_limit: float
    seed: int
    output: Path | None

    @property
    def constraints(self) -> Constraints:
        return Constraints(
            num_replicas=self.replicas,
            num_pipeline_ranks=self.pipeline_ranks,
            stages_per_rank=self.stages_per_rank,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.micro_batches,
            partition=None if self.partition is None else int(self.partition),
            partition_within=self.partition_within,
            recompute=self.recompute,
            offload_state=self.offload_state,
            offload_inputs=self.offload_inputs,
            num_buffers=self.num_buffers,
            modular=True if self.assignment == "modular" else None,
            schedule=Schedule(self.schedule) if self.schedule in set(Schedule) else None,
        )

    @property
    def update_on_host(self) -> bool:
        return self.update_on == "host"

    @property
    def order(self) -> OrderSearch | None:
        return OrderSearch(self.schedule) if self.schedule in set(OrderSearch) else None

    @property
    def training(self) -> Training:
        return Training(
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            price_per_hour=self.price,
        )

    @property
    def memory_limit_bytes(self) -> int | None:
        if self.memory_limit is None:
            return None
        try:
            return parse_bytes(self.memory_limit)
        except UsageError as error:
            raise UsageError(f"--memory-limit: {error.message}", hint=error.hint) from None

    def refuse_contradictions(self) -> None:
        """Raises UsageError with the first two demands that do not go together."""
        parts = (
            self._about_batch(), self._about_training(), self._about_mesh(), self._about_schedule()
        )  # fmt: skip
        for message, hint in itertools.chain(*parts):
            raise UsageError(message, hint=hint)
        _ = self.memory_limit_bytes

    def refuse_on(self, cluster: Cluster) -> None:
        """Raises UsageError with the first demand that no device of the cluster can meet."""
        limit = self.memory_limit_bytes
        for host in cluster.hosts:
            device = host.device
            if limit is not None and limit > device.memory_bytes:
                raise UsageError(
                    f"--memory-limit {self.memory_limit} is more than the "
                    f"{bytes_text(device.memory_bytes)} of memory that {device.name} has",
                    hint="a smaller limit, or a cluster of larger devices",
                )

    def _about_batch(self) -> Iterator[tuple[str, str]]:
        factors = {
            "--replicas": self.replicas,
            "--micro-batches": self.micro_batches,
            "--micro-batch-size": self.micro_batch_size,
        }
        given = {option: value for option, value in factors.items() if value is not None}
        words = " x ".join(f"{option} {value}" for option, value in given.items())
        product, batch = math.prod(given.values()), self.global_batch
        if self.critical_batch and batch is not None:
            yield (
                f"--critical-batch and --global-batch {_range_text(batch)} both give the batch",
                "leave one of them out",
            )
        if self.critical_batch and len(given) == len(factors):
            yield f"--critical-batch, and {words} = {product}", "leave one of them free"
        if batch is not None and batch.most < product:
            yield (
                f"a global batch of {_range_text(batch)} samples is less than {words}"
                + (f" = {product}" if len(given) > 1 else ""),
                f"a global batch of {product} or a multiple of it, or fewer of them",
            )

    def _about_training(self) -> Iterator[tuple[str, str]]:
        lengths = {
            "--steps": self.num_steps,
            "--tokens": self.num_tokens,
            "--samples": self.num_samples,
        }
        given = [f"{option} {value:g}" for option, value in lengths.items() if value is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} both give the length of the training", "leave one out"
        if self.price is not None and not given:
            yield (
                f"--price {self.price:g} is the price of an hour, but there is no number of hours",
                "give the length of the training with --steps, --tokens or --samples",
            )

    def _about_mesh(self) -> Iterator[tuple[str, str]]:
        factors = {"--replicas": self.replicas, "--pipeline-ranks": self.pipeline_ranks}
        given = {option: value for option, value in factors.items() if value is not None}
        if (devices := math.prod(given.values())) > self.gpus:
            words = " x ".join(f"{option} {value}" for option, value in given.items())
            yield (
                f"{words} need {devices} devices, but --gpus is {self.gpus}",
                f"--gpus {devices}, or fewer replicas or pipeline ranks",
            )
        yield from self._about_groups()
        partition = int(self.partition or 0)
        if partition and self.replicas == 1:
            yield (
                f"--partition {partition} divides the state among replicas, but --replicas is 1",
                "more replicas, or --partition 0",
            )
        if partition and self.pipeline_ranks == self.gpus:
            yield (
                f"--partition {partition} divides the state among replicas, but --pipeline-ranks "
                f"{self.pipeline_ranks} of --gpus {self.gpus} leave one replica",
                "fewer pipeline ranks, or --partition 0",
            )

    def _about_groups(self) -> Iterator[tuple[str, str]]:
        within, replicas = self.partition_within, self.replicas
        if within is not None and self.partition == "0":
            yield (
                f"--partition-within {within} says among whom a state is divided, but "
                "--partition 0 divides nothing",
                "--partition 1, 2 or 3, or leave one of them out",
            )
        if within == 1 and self.partition is not None:
            yield (
                f"--partition {self.partition} divides the state, but groups of "
                "--partition-within 1 have it whole",
                "larger groups, or --partition 0",
            )
        if isinstance(within, int) and within > self.gpus:
            yield (
                f"--partition-within {within} needs {within} replicas, but --gpus is {self.gpus}",
                "smaller groups, or more devices",
            )
        if isinstance(within, int) and replicas is not None and replicas % within:
            yield (
                f"--replicas {replicas} do not divide into groups of --partition-within {within}",
                f"groups of a divisor of {replicas}, or another number of replicas",
            )

    def _about_schedule(self) -> Iterator[tuple[str, str]]:
        """What only one schedule, or only others, can do."""
        asked = f"--schedule {self.schedule}"
        if self.schedule not in _PIPELINED and self.schedule != Schedule.PLAIN:
            return
        hint = f"leave one of them out, or --schedule {Schedule.LAYERED}"
        for option, value in (
            ("--offload-state", self.offload_state),
            ("--offload-inputs", self.offload_inputs),
            ("--update-on host", self.update_on_host),
        ):
            if value:
                yield f"{option} goes with the layered schedule alone, not with {asked}", hint
        if self.schedule == Schedule.PLAIN:
            if (self.pipeline_ranks or 1) > 1:
                words = f"not for --pipeline-ranks {self.pipeline_ranks}"
                yield f"{asked} is for one pipeline rank, {words}", hint
            return
        if self.pipeline_ranks == 1 or self.gpus == (self.replicas or 1):
            one = "--pipeline-ranks is 1"
            if self.pipeline_ranks != 1:
                one = f"--gpus {self.gpus} leave one for each of the replicas"
            if self.gpus == 1:
                one = "--gpus is 1"
            yield f"{asked} is for pipelines of several ranks, but {one}", hint
        stages, ranks, count = self.stages_per_rank, self.pipeline_ranks, self.micro_batches
        if stages is not None and (stages > 1) is not (self.schedule in _LOOPED):
            takes = "several stages" if self.schedule in _LOOPED else "one stage"
            yield f"{asked} takes {takes} per rank, not --stages-per-rank {stages}", hint
        if self.schedule == Schedule.INTERLEAVED and ranks and count and count % ranks:
            words = f"--micro-batches {count} are no multiple of --pipeline-ranks {ranks}"
            yield f"{asked} takes as many micro-batches as ranks at a time, but {words}", hint


_LOOPED = (Schedule.INTERLEAVED, Schedule.HYBRID)
"""Of several stages per rank."""
_PIPELINED = (*_LOOPED, Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE)
"""Of several pipeline ranks."""


def _range_text(batch: BatchRange) -> str:
    return str(batch.least) if batch.least == batch.most else f"{batch.least}..{batch.most}"
