"""Where the processes of a job meet: torch's store, with a part of its own for each time they do.

The store lives as long as the launcher's job, and torch would use the same keys for every process
group that is made in it: a rank that is early would find where another one was the last time. This
module knows stores. It does not know what the processes do.
"""

import os
from datetime import timedelta
from functools import cache

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

__all__ = ["meeting_store"]


def meeting_store(world_rank: int, world_size: int, timeout: timedelta) -> Store:
    """For the next process group of the job that the environment describes: the same on all ranks,
    each of which counts its own.

    Raises:
        RuntimeError: the store cannot be reached.
    """
    place = tuple(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = _store(place, world_rank, world_size, timeout)
    store.set_timeout(timeout)
    number = store.add(f"lga_meetings/{attempt}/{world_rank}", 1)
    return PrefixStore(f"lga_meeting/{attempt}/{number}", store)


@cache  # kept, because the rank that hosts the store must not end it between two meetings
def _store(
    _place: tuple[str, ...], _world_rank: int, _world_size: int, timeout: timedelta
) -> Store:
    store: Store = next(iter(rendezvous("env://", timeout=timeout)))[0]
    return store
