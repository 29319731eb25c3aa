"""Notices, outside the data path, that a rank died or stopped, and ends this process.

Each rank raises a counter in the job's TCPStore and watches the next few ranks; what it finds
becomes a verdict that all ranks read. So the first living rank before any run of dead ones names
the first of them, and the store's work grows as the number of ranks. Knows ranks and the store;
does not know what the run is doing.
"""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from planner.plan.types import Plan
from runtime.failure import LAUNCHED_BY_LGA_RUN, FailureReport, end_process
from runtime.ranks import rank_name

__all__ = ["Heartbeat"]

NUM_WATCHED = 8
_VERDICT = "verdict"
_NUM_DONE = "num_done"


class Heartbeat:
    """One rank's heartbeat. Start it on all ranks at about the same time, after `initialise`."""

    def __init__(self, plan: Plan, world_rank: int) -> None:
        self._plan = plan
        self._rank = world_rank
        self._limit_seconds = plan.options.heartbeat_seconds
        self._beat_seconds = min(1.0, self._limit_seconds / 5)
        client = _own_client(self._limit_seconds)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # The store may outlive this session: every rank counts those that it has had.
        session = client.add(f"lga_sessions/{attempt}/{world_rank}", 1)
        self._store = dist.PrefixStore(f"lga_heartbeat/{attempt}/{session}", client)  # type: ignore[attr-defined]
        self._ends = threading.Event()
        self._failure: FailureReport | None = None
        self._counters: dict[int, int] = {}
        self._changed_seconds: dict[int, float] = {}
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._store.set(f"place/{self._rank}", f"{os.getpid()} {socket.gethostname()}")
        num_watched = min(NUM_WATCHED, self._plan.world_size - 1)
        now = time.monotonic()
        for distance in range(1, num_watched + 1):
            peer = (self._rank + distance) % self._plan.world_size
            self._counters[peer], self._changed_seconds[peer] = 0, now
        self._thread.start()

    def stop(self) -> None:
        """This rank has ended well. Returns when all ranks have, and goes on watching till then.

        Ends the process if that takes longer than the plan's deadline.
        """
        self._ends.set()
        self._thread.join()

    def fail(self, report: FailureReport) -> None:
        """This rank is about to end with an error: tell the others, which then end too."""
        self._failure = report
        self._ends.set()
        self._thread.join(self._limit_seconds)

    def explain(self, report: FailureReport) -> None:
        """This rank lost a peer: give the heartbeat time to find which rank died first.

        Ends the process with that rank's name. Returns only if every rank turns out to live.
        """
        self._thread.join(self._limit_seconds + 3 * self._beat_seconds)
        self.fail(report)

    def _loop(self) -> None:
        try:
            while not self._ends.wait(self._beat_seconds):
                self._beat()
            if self._failure is not None:
                here = rank_name(self._rank, self._plan.grid)
                text = self._failure.message
                self._store.compare_set(_VERDICT, "", text if here in text else f"{here}: {text}")
                return
            self._store.add(_NUM_DONE, 1)
            ends = time.monotonic() + self._plan.options.deadline_seconds
            while (num_done := self._store.add(_NUM_DONE, 0)) < self._plan.world_size:
                if time.monotonic() > ends:
                    self._end(
                        f"only {num_done} of {self._plan.world_size} ranks have ended, "
                        f"{self._plan.options.deadline_seconds:g} s after this one"
                    )
                self._beat()
                time.sleep(self._beat_seconds / 20)
        except RuntimeError:  # every error of the store
            self._lost_store()

    def _beat(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_VERDICT]):
            self._end(self._store.get(_VERDICT).decode())
        for peer, known in self._counters.items():
            counter = self._store.add(f"beat/{peer}", 0)
            now = time.monotonic()
            if counter != known:
                self._counters[peer], self._changed_seconds[peer] = counter, now
            elif now - self._changed_seconds[peer] > self._limit_seconds:
                self._end(self._condemn(peer, now - self._changed_seconds[peer]))

    def _condemn(self, peer: int, silent_seconds: float) -> str:
        """The verdict that all ranks will read: this one, or an earlier one."""
        pid, host = 0, "unknown"
        if self._store.check([f"place/{peer}"]):
            word, host = self._store.get(f"place/{peer}").decode().split(" ", 1)
            pid = int(word)
        last_seen = time.strftime("%H:%M:%S", time.localtime(time.time() - silent_seconds))
        verdict = self._store.compare_set(
            _VERDICT,
            "",
            f"{rank_name(peer, self._plan.grid)} on host {host} died or stopped: last "
            f"seen at {last_seen}, not heard of for {silent_seconds:.1f} s",
        ).decode()
        if pid and host == socket.gethostname() and LAUNCHED_BY_LGA_RUN in os.environ:
            # A stopped process heeds nothing else, and the launcher would wait for it.
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return verdict

    def _lost_store(self) -> None:
        """The store ended with its owner."""
        owned_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._ends.is_set() and (self._failure is not None or not owned_by_launcher):
            return  # rank 0 ends its store only when all are done
        owner = "the launcher" if owned_by_launcher else rank_name(0, self._plan.grid)
        os.environ.pop(LAUNCHED_BY_LGA_RUN, None)  # nobody else is left to say it
        place = os.environ.get("MASTER_ADDR", "the address that all ranks were given")
        self._end(f"{owner} died: the job's store at {place} is gone")

    def _end(self, verdict: str) -> None:
        here = rank_name(self._rank, self._plan.grid)
        end_process(
            FailureReport(
                message=f"{verdict}; {here} ends with it",
                hint="see the last words of that rank",
                consequence=True,
                exit_code=1,
            )
        )


def _own_client(limit_seconds: float) -> Any:
    """The job's store, over a connection of its own where stores have connections: one is blocked
    while another thread waits in it."""
    store: Any = dist.distributed_c10d._get_default_store()
    innermost = store
    while isinstance(innermost, dist.PrefixStore):  # type: ignore[attr-defined]
        innermost = innermost.underlying_store
    if not isinstance(innermost, dist.TCPStore):  # type: ignore[attr-defined]
        return store
    client = store.clone()
    client.set_timeout(timedelta(seconds=limit_seconds))
    return client
