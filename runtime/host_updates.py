"""The thread of updates on the host, so that compute goes on meanwhile.

It runs what it is given, one thing at a time and in order, so results do not depend on when. This
module knows jobs and errors. It does not know what a job does.
"""

from collections.abc import Callable
from concurrent.futures import Future

from planner.errors import DeadlineError, UsageError
from runtime.optimize import UnitOptimizer
from runtime.transport import Pending
from runtime.worker import Worker

__all__ = ["HostUpdates", "check_optimizer"]


class HostUpdates:
    """The thread of one rank."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._worker = Worker("host updates")

    def submit(self, job: Callable[[], None], what: str) -> Pending:
        """Run it behind what was submitted before; `wait` raises what it raises.

        `what` names it in the error of a job that does not end within the plan's deadline.
        """
        return _Job(self._worker.submit(job), self._deadline_seconds, what)

    def close(self) -> None:
        """End the thread, after the jobs that it has."""
        self._worker.close()


class _Job:
    def __init__(self, future: "Future[None]", deadline_seconds: float, what: str) -> None:
        self._future, self._deadline_seconds, self._what = future, deadline_seconds, what

    def wait(self) -> None:
        try:
            self._future.result(self._deadline_seconds)
        except TimeoutError as error:
            if self._future.done():  # the job's own
                raise
            raise DeadlineError(
                f"{self._what}: the host did not end it within the deadline of "
                f"{self._deadline_seconds:g} s",
                hint="see what else runs on the host; a slow one needs a longer deadline "
                "(--deadline), or updates on the device",
            ) from error

    def follow(self) -> None:
        """Nothing of a device waits for the host: `wait` does."""


def check_optimizer(optimizer: UnitOptimizer) -> None:
    """Refuse an optimizer that steps on a GPU alone.

    Raises:
        UsageError: it asks for `capturable`.
    """
    if any(group.get("capturable") for group in optimizer.optimizer.param_groups):
        raise UsageError(
            "the plan updates on the host, but build_optimizer asks for capturable, which is for a "
            "GPU",
            hint="leave out capturable, or plan without --update-on host",
        )
