"""torch's own pipeline schedules in one process: a group of ranks that only pretend to talk."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _Action,
    _PipelineSchedule,
    _PipelineScheduleRuntime,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["csv_of", "fake_ranks", "load_csv", "torch_order"]

Rows = dict[int, list[_Action | None]]
IN_A_V = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """As rank 0 of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_csv(
    path: str,
    csv_format: str,
    *,
    num_ranks: int,
    local_stages: list[int],
    num_stages: int,
    num_micro_batches: int,
) -> _PipelineScheduleRuntime:
    """torch's runtime with the schedule loaded, which validates it."""
    with fake_ranks(num_ranks):
        stages = [_stage(index, num_stages) for index in local_stages]
        runtime = _PipelineScheduleRuntime(
            stages, num_micro_batches, loss_fn=nn.functional.mse_loss
        )
        runtime._load_csv(path, format=csv_format)
    return runtime


def torch_order(name: str, num_ranks: int, stages_per_rank: int, num_micro_batches: int) -> Rows:
    """The order of compute that a schedule class of torch makes."""
    schedule_class: type[_PipelineSchedule] = getattr(schedules, name)
    num_stages = num_ranks * stages_per_rank
    local = [0, num_stages - 1] if name in IN_A_V else list(range(0, num_stages, num_ranks))
    with fake_ranks(num_ranks):
        stages = [_stage(index, num_stages) for index in local]
        if issubclass(schedule_class, PipelineScheduleSingle):
            single = schedule_class(stages[0], num_micro_batches, loss_fn=nn.functional.mse_loss)
            return single._get_pipeline_order()
        loops = schedule_class(stages, num_micro_batches, loss_fn=nn.functional.mse_loss)
        return loops.pipeline_order


def csv_of(rows: Rows) -> str:
    """As torch's `_dump_csv` writes it: an empty cell where a rank idles."""
    return "".join(
        ",".join("" if action is None else str(action) for action in rows[rank]) + "\r\n"
        for rank in rows
    )


def _stage(index: int, num_stages: int) -> PipelineStage:
    return PipelineStage(nn.Linear(1, 1), index, num_stages, torch.device("cpu"))
