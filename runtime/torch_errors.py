"""What torch.distributed's errors mean: RuntimeErrors that differ in their text only."""

from planner.errors import DeadlineError, PeerLostError
from planner.plan.types import Plan
from runtime.ranks import rank_name

__all__ = ["connection_error", "first_line", "run_error"]


def run_error(
    error: RuntimeError, plan: Plan, world_rank: int, what: str, peer: str
) -> DeadlineError | PeerLostError:
    """An error of torch.distributed in terms of the plan: who waited for whom, and for what."""
    here = rank_name(world_rank, plan.grid)
    reason = first_line(error)
    if any(word in str(error).lower() for word in ("timed out", "timeout")):
        return DeadlineError(
            f"{here}: {what}: no answer from {peer} within the deadline of "
            f"{plan.options.deadline_seconds:g} s ({reason})",
            hint="see what that rank is doing; a slow network or a slow first step needs a "
            "longer deadline (--deadline)",
        )
    return PeerLostError(
        f"{here}: {what}: lost the connection to {peer} ({reason})",
        hint="see the last words of that rank: it ended first",
    )


def connection_error(
    error: BaseException, plan: Plan, world_rank: int
) -> DeadlineError | PeerLostError | None:
    """What an error of torch.distributed's own calls means; None if it is some other error."""
    words = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "nccl")
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words):
        return run_error(error, plan, world_rank, "a collective of all ranks", "the other ranks")
    return None


def first_line(error: BaseException) -> str:
    """Without the source location that gloo puts first."""
    return str(error).split("\n")[0].split("] ", 1)[-1].split(". This is typically")[0]
