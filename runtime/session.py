"""One rank's part in a distributed run: joined, watched, and left in order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from planner.errors import DeadlineError, PeerLostError
from planner.plan.types import Plan
from runtime.failure import FailureReport
from runtime.heartbeat import Heartbeat
from runtime.torch_errors import connection_error
from runtime.transfer import DistributedTransport, initialise

__all__ = ["device_of", "distributed_session", "is_launched"]


@contextmanager
def distributed_session(
    plan: Plan, device: torch.device
) -> Iterator[tuple[DistributedTransport, int]]:
    """Yields this rank's transport and world rank. All ranks leave the block together.

    A default process group that is there already is used, and stays.

    An error inside is told to the other ranks, which end, and raised again. Where it followed
    from the loss of another rank, the process ends here with that rank's name, if one is found.

    Raises:
        UsageError: see `runtime.transfer.initialise`.
    """
    joins_job = not dist.is_initialized()
    world_rank = initialise(plan)
    heartbeat = Heartbeat(plan, world_rank)
    heartbeat.start()
    try:
        transport = DistributedTransport(plan, world_rank, device, leaves_job=joins_job)
        yield transport, world_rank
        heartbeat.stop()
        transport.close()
    except (DeadlineError, PeerLostError) as error:
        heartbeat.explain(FailureReport.of(error))
        raise
    except BaseException as error:
        lost = connection_error(error, plan, world_rank)
        if lost is None:
            heartbeat.fail(FailureReport.of(error))
            raise
        heartbeat.explain(FailureReport.of(lost))
        raise lost from error


def is_launched() -> bool:
    """Whether this process was started, or has made itself, one of several ranks."""
    return dist.is_initialized() or ("RANK" in os.environ and "WORLD_SIZE" in os.environ)


def device_of(plan: Plan) -> torch.device:
    """This rank's device: its own GPU for plans made for GPUs, else the CPU."""
    if plan.backend != "nccl":
        return torch.device("cpu")
    # Streams share hardware queues, 8 of them by default: what waits in one would hold up another.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
