"""What a run shows: progress, the verdict of --verify, and prediction against measurement."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from planner.plan.types import Plan
from planner.timeline import Timeline
from runtime.result import StepResult
from runtime.verify import Difference, worst

__all__ = ["Measured", "Progress", "not_finite_message", "print_comparison", "print_verdict"]

_MOST_NAMES = 5
"""Parameters named in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one rank measured."""

    rank: int
    """Pipeline rank."""
    step_seconds: float | None
    """Median over the steps that count; None where too few ran."""
    peak_bytes: int | None
    """None where it cannot be measured."""
    timeline: Timeline | None = None
    """Of the last step, where it was asked for; of replica 0 only."""


class Progress:
    """A bar on a terminal; elsewhere one line every `log_every` steps."""

    def __init__(self, console: Console, plan: Plan, num_steps: int, log_every: int) -> None:
        self._console, self._samples = console, plan.global_batch_size
        self._num_steps, self._log_every = num_steps, log_every
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, text="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, loss: float, seconds: float) -> None:
        """Step number `step` (from 1) is done."""
        text = f"loss {loss:.4f}  {self._samples / seconds:.1f} samples/s"
        self._bar.update(self._task, completed=step, text=text)
        if step % self._log_every == 0 or step in (1, self._num_steps):
            self._console.print(f"step {step}/{self._num_steps}  {text}")


def not_finite_message(step: int, result: StepResult) -> str:
    """What a step (from 1) that updated nothing found, by parameter and world rank."""
    names = sorted(result.not_finite)
    shown = [
        f"{name} (rank {', '.join(map(str, result.not_finite[name]))})"
        for name in names[:_MOST_NAMES]
    ]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    where = f": {', '.join(shown)}{more}" if shown else ""
    return f"step {step}: a gradient is not finite, nothing was updated{where}"


def print_verdict(console: Console, found: Sequence[Difference]) -> str:
    """Print how far the planned step was from plain accumulation; what failed, empty if nothing."""
    exact = [difference for difference in found if difference.tolerance == 0]
    largest = worst(list(found))
    console.print(
        f"verify: {len(found)} tensors compared with plain accumulation in one process: "
        f"{sum(d.largest == 0 for d in found)} bitwise equal "
        f"({len(exact)} had to be)"
    )
    console.print(
        f"verify: largest difference {largest.largest:.3g} (relative RMS "
        f"{largest.relative_rms:.3g}) in {largest.name}"
    )
    for tolerance in sorted({d.tolerance for d in found if d.tolerance}):
        names = sorted({d.name for d in found if d.tolerance == tolerance})
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(
            f"verify: relative RMS up to {tolerance:g} allowed where additions are in another "
            f"order, or compiled: {shown}"
        )
    failed = [difference for difference in found if not difference.passed]
    if not failed:
        console.print("verify: passed")
        return ""
    return (
        f"{len(failed)} of {len(found)} tensors differ from plain accumulation; the worst is "
        f"{largest.name}: largest difference {largest.largest:.3g}, relative RMS "
        f"{largest.relative_rms:.3g}, allowed {largest.tolerance:g}"
    )


def print_comparison(
    console: Console, plan: Plan, measured: Sequence[Measured], *, is_compiled: bool = False
) -> None:
    """Predicted against measured step time and peak memory."""
    prediction = plan.prediction
    table = Table(title="predicted and measured")
    for column in ("what", "predicted", "measured", "measured / predicted"):
        table.add_column(column, justify="left" if column == "what" else "right")
    seconds = [m.step_seconds for m in measured if m.step_seconds is not None]
    if seconds:
        predicted = prediction.step_seconds if prediction else None
        table.add_row("step time", *_row(predicted, max(seconds), 1e3, "ms"))
    for rank in range(plan.num_pipeline_ranks):
        peaks = [m.peak_bytes for m in measured if m.rank == rank and m.peak_bytes is not None]
        if not peaks:
            continue
        expected = prediction.peak_bytes[rank] if prediction else None
        table.add_row(
            f"peak memory, pipeline rank {rank}", *_row(expected, max(peaks), 1 / 2**20, "MiB")
        )
    console.print(table)
    if is_compiled:
        console.print(
            "the predictions are of stages that run eagerly: what is compiled takes another time, "
            "and other memory, which is not measured on a CPU"
        )
    if not seconds:
        console.print("step time needs at least 3 steps: the first two warm up and measure memory")


def _row(predicted: float | None, measured: float, scale: float, unit: str) -> tuple[str, str, str]:
    shown = f"{measured * scale:.2f} {unit}"
    if not predicted:
        return "unknown", shown, ""
    return f"{predicted * scale:.2f} {unit}", shown, f"{measured / predicted:.2f}"
