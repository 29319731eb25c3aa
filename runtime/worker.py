"""A thread that runs jobs in order.

This module knows jobs and errors. It does not know what a job does, nor how long one may wait for
it.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["Worker"]

Job = Callable[[], None]


class Worker:
    """Starts with its first job, and ends with the process, or before that with `close`.

    After the first error every later job fails with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Future[None], Job] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> "Future[None]":
        """Run it behind what was submitted before; the result raises what it raises."""
        if self._thread is None:
            # A daemon: a job may be blocked for as long as the deadline when the run fails.
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """End the thread, after the jobs that it has."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None

    def _loop(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            self._error = self._error or _error_of(job)
            # Its buffers go before anybody hears that it is over, and might make more.
            del item, job
            if self._error is None:
                future.set_result(None)
            else:
                future.set_exception(self._error)
            del future


def _error_of(job: Job) -> BaseException | None:
    try:
        job()
    except BaseException as error:
        return error
    return None
