"""A whole training in hours and money, and the batch sizes that were tried, for the terminal.

Computes sums of the plan's step time alone: evaluations, checkpoints and restarts are not counted.
"""

from collections.abc import Sequence

from rich.table import Table

from planner.batch import Training, Tried, tokens_per_sample
from planner.pipeline import PlanResult
from planner.report.quantities import count_text, seconds_text

__all__ = ["batch_table", "training_lines"]

_SECONDS_PER_HOUR = 3600.0


def training_lines(training: Training, result: PlanResult) -> list[str]:
    """Length, hours, GPU-hours and, with a price, cost; a line each. Empty where none is asked."""
    if not training.is_given:
        return []
    plan, tokens = result.plan, tokens_per_sample(result.graph)
    steps = training.steps_with(plan.global_batch_size, tokens)
    num_samples = steps * plan.global_batch_size
    length = f"{count_text(num_samples)} samples"
    if tokens is not None:
        length += f", {count_text(num_samples * tokens)} tokens"
    hours = _hours(training, result)
    words = [
        f"training  {steps} steps of {plan.global_batch_size} samples: {length}",
        f"time      {_number(hours)} hours ({_number(hours / 24)} days), "
        f"{_number(hours * plan.world_size)} GPU-hours on {plan.world_size} GPUs, "
        "steps alone",
    ]
    if training.price_per_hour is not None:
        cost = hours * plan.world_size * training.price_per_hour
        words.append(f"cost      {cost:,.2f}, at {training.price_per_hour:g} per GPU-hour")
    return words


def batch_table(training: Training, tried: Sequence[Tried]) -> Table:
    """A row per batch size: the best plan's mesh, schedule and times, or why there is none."""
    table = Table(title="batch sizes", title_justify="left")
    heads = ["batch", "mesh x loops", "micro-batches", "schedule", "step", "per sample"]
    heads += ["hours", "GPU-hours"] if training.is_given else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    best = min(tried, key=lambda one: one.sample_seconds)
    for one in tried:
        if one.result is None:
            blank = [""] * (len(heads) - 1)
            table.add_row(str(one.global_batch_size), *blank, one.reason.partition("\n")[0])
            continue
        plan, seconds = one.result.plan, one.result.solution.step_seconds
        hours = _hours(training, one.result) if training.is_given else 0.0
        loops = plan.num_stages // plan.num_pipeline_ranks
        table.add_row(
            str(one.global_batch_size),
            f"{plan.num_replicas} x {plan.num_pipeline_ranks} x {loops}",
            f"{plan.num_micro_batches} x {plan.micro_batch_size}",
            plan.schedule.value,
            seconds_text(seconds),
            seconds_text(one.sample_seconds),
            *([_number(hours), _number(hours * plan.world_size)] if training.is_given else []),
            "best" if one is best else "",
        )
    return table


def _hours(training: Training, result: PlanResult) -> float:
    steps = training.steps_with(result.plan.global_batch_size, tokens_per_sample(result.graph))
    return steps * result.solution.step_seconds / _SECONDS_PER_HOUR


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
