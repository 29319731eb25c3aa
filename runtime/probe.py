"""Times transfers and collectives with the calls that plans run on, alone and beside compute.

Every measurement is called by every rank of a transport at about the same moment; ranks without a
part in it return nothing. Times are of one rank's clock, so clocks need not agree. Knows the
Transport; does not know hosts, nor what becomes of the figures.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.transport import Pending, Transport

__all__ = ["Beside", "Probe", "message_sizes", "spread_of", "wait_for_all"]

SMALL_BYTES = 4
_MAX_REPEATS, _MIN_REPEATS = 30, 5
_REPEATED_BYTES = 2**24  # sizes are repeated until about so much has gone by
_NUM_SIZES = 5
_FACTOR = 8


def message_sizes(largest_bytes: int) -> tuple[int, ...]:
    """4 bytes, and up to five sizes a factor of 8 apart, the last one `largest_bytes`."""
    larger = [largest_bytes // _FACTOR**power // 4 * 4 for power in reversed(range(_NUM_SIZES))]
    return (SMALL_BYTES, *(size for size in larger if size > SMALL_BYTES))


def spread_of(seconds: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a part of the median; 0 for fewer than three."""
    if len(seconds) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2 / middle


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What one rank saw of an operation beside a computation of about the same length."""

    operation_seconds: float
    """Alone; so the next."""
    compute_seconds: float
    compute_meanwhile_seconds: float
    """The computation, with the operation under way."""
    both_seconds: float
    """Until both were over."""

    @property
    def hidden(self) -> float:
        """Part of the operation's own time that does not lengthen the computation: 0 to 1."""
        longer = self.both_seconds - self.compute_seconds
        return min(1.0, max(0.0, 1 - longer / self.operation_seconds))

    @property
    def slowdown(self) -> float:
        """By how much the computation took longer, as a part of its own time."""
        return max(0.0, self.compute_meanwhile_seconds / self.compute_seconds - 1)


class Probe:
    """One rank's part in measurements over one transport."""

    def __init__(self, transport: Transport, rank: int, device: torch.device) -> None:
        self._transport = transport
        self._rank = rank
        self._device = device
        self._small = self._tensor(SMALL_BYTES), self._tensor(SMALL_BYTES)
        width, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
        self._factors = [torch.ones(width, width, dtype=dtype, device=device) for _ in range(3)]

    def one_way(self, source: int, destination: int, num_bytes: int) -> list[float]:
        """Seconds from the send of a message to its answer of 4 bytes, at the source."""
        tensor, (small, answer) = self._tensor(num_bytes), self._small
        repeats = _repeats(num_bytes) + 1  # the first one warms up
        found: list[float] = []
        if self._rank == source:
            for _ in range(repeats):
                self._synchronise()  # not later: it would wait for the answer too
                answered = self._transport.receive(destination, answer, "an answer")
                start = time.perf_counter()
                self._transport.send(destination, tensor, f"{num_bytes} bytes").wait()
                answered.wait()
                found.append(self._now() - start)
        elif self._rank == destination:
            what = f"{num_bytes} bytes"
            arriving = self._transport.receive(source, tensor, what)
            for repeat in range(repeats):
                arriving.wait()
                self._synchronise()
                if repeat + 1 < repeats:  # posted early, as a plan does
                    arriving = self._transport.receive(source, tensor, what)
                self._transport.send(source, small, "an answer").wait()
        return found[1:]

    def end_seconds(self, source: int, destination: int) -> float | None:
        """Processor time, of all threads, that one end of a small message takes here."""
        start = time.process_time()
        self.one_way(source, destination, SMALL_BYTES)
        used = time.process_time() - start
        ends = 2 * (_repeats(SMALL_BYTES) + 1)
        return used / ends if self._rank in (source, destination) else None

    def exchange(self, peers: tuple[int, int] | None, num_bytes: int) -> list[float]:
        """Seconds to send to one rank and receive from another at once; None takes no part.

        Every rank that takes part is in the first place of one other rank's peers and in the second
        place of one other's.
        """
        if peers is None:
            return []
        run = self._exchanging(peers, num_bytes)
        found = []
        for _ in range(_repeats(num_bytes) + 1):
            self._meet(peers)
            start = self._now()
            _wait(run())
            found.append(self._now() - start)
        return found[1:]

    def collective(self, operation: str, num_replicas: int, num_bytes: int) -> list[float]:
        """Seconds of a collective over the replicas, the whole vector `num_bytes`."""
        run = self._collecting(operation, num_replicas, num_bytes)
        found = []
        for _ in range(_repeats(num_bytes) + 1):
            self._transport.all_reduce(self._small[0], "a start together").wait()
            start = self._now()
            _wait(run())
            found.append(self._now() - start)
        return found[1:]

    def exchange_beside(self, peers: tuple[int, int] | None, num_bytes: int) -> Beside | None:
        """An exchange as above, beside compute on every rank."""
        if peers is None:
            return None
        run = self._exchanging(peers, num_bytes)
        return self._beside(run, lambda: self._meet(peers))

    def collective_beside(self, operation: str, num_replicas: int, num_bytes: int) -> Beside:
        """A collective as above, beside compute on every rank."""
        run = self._collecting(operation, num_replicas, num_bytes)
        start = "a start together"
        return self._beside(run, lambda: self._transport.all_reduce(self._small[0], start).wait())

    def _exchanging(
        self, peers: tuple[int, int], num_bytes: int
    ) -> Callable[[], Iterable[Pending]]:
        leaving, arriving = self._tensor(num_bytes), self._tensor(num_bytes)
        what = f"{num_bytes} bytes"

        def run() -> Iterable[Pending]:
            received = self._transport.receive(peers[1], arriving, what)
            return (received, self._transport.send(peers[0], leaving, what))

        return run

    def _collecting(
        self, operation: str, num_replicas: int, num_bytes: int
    ) -> Callable[[], Iterable[Pending]]:
        part = self._tensor(max(num_bytes // num_replicas, 1))
        whole = self._tensor(part.nbytes * num_replicas)
        what = f"{operation} of {num_bytes} bytes"
        match operation:
            case "gather":
                return lambda: (self._transport.gather(part, whole, what),)
            case "reduce-scatter":
                return lambda: (self._transport.reduce_scatter(whole, part, what),)
            case "all-reduce":
                return lambda: (self._transport.all_reduce(whole, what),)
        raise AssertionError(operation)

    def _meet(self, peers: tuple[int, int]) -> None:
        """Leave at about the same moment as the peers."""
        small, other = self._small
        arriving = self._transport.receive(peers[1], other, "a start together")
        self._transport.send(peers[0], small, "a start together").wait()
        arriving.wait()
        self._synchronise()

    def _beside(self, run: Callable[[], Iterable[Pending]], meet: Callable[[], None]) -> Beside:
        """Medians of a few rounds of: the operation, the compute, both."""
        alone = statistics.median([self._timed(run, meet) for _ in range(_MIN_REPEATS + 1)][1:])
        repeats = max(1, round(alone / self._compute_seconds(1)))
        found = []
        for _ in range(_MIN_REPEATS):
            alone = self._timed(run, meet)
            computing = self._compute_seconds(repeats)
            meet()
            start = self._now()
            under_way = run()
            meanwhile = self._compute_seconds(repeats)
            _wait(under_way)
            found.append((alone, computing, meanwhile, self._now() - start))
        columns = [statistics.median(column) for column in zip(*found, strict=True)]
        return Beside(
            operation_seconds=columns[0],
            compute_seconds=columns[1],
            compute_meanwhile_seconds=columns[2],
            both_seconds=columns[3],
        )

    def _timed(self, run: Callable[[], Iterable[Pending]], meet: Callable[[], None]) -> float:
        meet()
        start = self._now()
        _wait(run())
        return self._now() - start

    def _compute_seconds(self, repeats: int) -> float:
        """Of matrix products. On a GPU the clock is the compute stream's own."""
        left, right, product = self._factors
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                torch.mm(left, right, out=product)
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right, out=product)
        return time.perf_counter() - start

    def _tensor(self, num_bytes: int) -> Tensor:
        return torch.zeros(max(num_bytes // 4, 1), device=self._device)

    def _now(self) -> float:
        self._synchronise()
        return time.perf_counter()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def wait_for_all(device: torch.device) -> None:
    """Until every rank of the job has come here."""
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wait(pending: Iterable[Pending]) -> None:
    for item in pending:
        item.wait()


def _repeats(num_bytes: int) -> int:
    return max(_MIN_REPEATS, min(_MAX_REPEATS, _REPEATED_BYTES // num_bytes))
