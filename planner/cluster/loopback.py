"""A script of its own: gloo's one-way seconds of a tiny and of a large message over loopback.

It runs as a process apart because gloo can crash its process when a connection times out. Its two
ranks are threads of that process, because a second process would take another second to import
torch; the bytes pass through the same sockets and gloo's own threads either way. Imports nothing
of the package, so that it starts quickly.
"""

import datetime
import json
import os
import sys
import threading
import time

import torch
from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]

__all__ = ["measure"]

_REPEATS = {4: 50, 16 * 2**20: 4}
"""Message bytes -> how often it is sent each way."""


def measure(deadline_seconds: float) -> dict[str, float]:
    """Shortest one-way seconds by message bytes, and `end`: the processor time that each end of a
    small message takes. Empty where the ranks did not finish in time.
    """
    seconds: dict[str, float] = {}
    store = HashStore()
    ranks = [
        threading.Thread(target=_exchange, args=(rank, store, deadline_seconds, seconds))
        for rank in range(2)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    return seconds


def _exchange(
    rank: int, store: HashStore, deadline_seconds: float, seconds: dict[str, float]
) -> None:
    """One of two ranks; rank 0 notes the times."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = datetime.timedelta(seconds=deadline_seconds)
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    group = ProcessGroupGloo(store, rank, 2, options)
    for num_bytes, repeats in _REPEATS.items():
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        processor = 0.0
        for repeat in range(repeats + 1):  # the first one warms up
            if repeat == 1:
                processor = time.process_time()  # of all threads: both ranks, and gloo's own
            start = time.perf_counter()
            for sender in range(2):
                if rank == sender:
                    group.send([tensor], 1 - rank, 0).wait()  # type: ignore[attr-defined]
                else:
                    group.recv([tensor], 1 - rank, 0).wait()  # type: ignore[attr-defined]
            one_way = (time.perf_counter() - start) / 2
            if rank == 0 and repeat:
                key = str(num_bytes)
                seconds[key] = min(one_way, seconds.get(key, one_way))
        if rank == 0 and num_bytes == min(_REPEATS):
            num_ends = 4 * repeats  # a message each way has four
            seconds["end"] = (time.process_time() - processor) / num_ends


if __name__ == "__main__":
    json.dump(measure(float(sys.argv[1])), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # leaving the interpreter in good order would take half a second more
