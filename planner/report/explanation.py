"""Explanations as lines and tables for the terminal.

This module knows words and columns. What stands in them was solved and simulated elsewhere.
"""

from collections.abc import Mapping, Sequence

from rich.table import Table

from planner.explain.comparison import Side
from planner.explain.explanation import Explanation, Loss, Verdict
from planner.explain.remedies import Remedy
from planner.explain.shares import Bottleneck, Shares
from planner.explain.types import Resolved
from planner.partitions import partition_text
from planner.report.plain import plain_table
from planner.report.quantities import bytes_text, seconds_text
from planner.solve import Placement

__all__ = [
    "better_lines",
    "bottleneck_lines",
    "families_table",
    "nothing_fits_lines",
    "offers_table",
    "placement_text",
    "sides_table",
]

_CLASSES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "stored_inputs": "stored inputs",
    "activations": "saved activations",
    "buffers": "gather buffers",
    "transient": "work space",
}
_LOSSES = {
    "compute": "compute",
    "recompute": "recompute",
    "update": "updates",
    "waiting for gathers": "exposed gathers",
    "waiting for reductions": "exposed reductions",
    "waiting for transfers": "exposed transfers",
    "waiting for copies from the host": "exposed copies from the host",
    "waiting for copies to the host": "exposed copies to the host",
}
_MAX_LOSSES = 3
_SMALL = 0.002
"""Parts of the step below which a loss is not worth a word."""


def bottleneck_lines(found: Bottleneck) -> list[str]:
    """What bounds the step: rank, link, memory, a line each."""
    step, shares = found.step_seconds, found.shares
    lines = [f"bound     rank {found.rank} is busiest: {_shares_text(shares, step)}"]
    link = found.link
    if link is None:
        lines.append("link      nothing is sent, or no link is ever short")
    else:
        lines.append(
            f"link      {link.name} carries {bytes_text(link.num_bytes)} a step: busy for "
            f"{_share(link.busy_seconds, step)} of it"
        )
    used, limit = found.memory.total_bytes, found.memory_limit_bytes
    lines.append(
        f"memory    rank {found.memory_rank} is fullest: {bytes_text(used)} of {bytes_text(limit)} "
        f"({used / limit:.1%}), most of it {_CLASSES[found.memory_class]} "
        f"({bytes_text(found.class_bytes)})"
    )
    return lines


def better_lines(explanation: Explanation) -> list[str]:
    """A line where a family beats the plan."""
    better = explanation.better
    if better is None or better.ratio is None:
        return []
    family, placement = better.result.family, better.result.placement
    lines = [
        f"better    {family.name} takes {seconds_text(better.result.step_seconds or 0.0)}, "
        f"{1 - better.ratio:.1%} less than the plan above"
    ]
    if placement is not None:
        lines.append(f"          demand it with {_demands(placement)}")
    return lines


def nothing_fits_lines(words: str, why: str, remedies: Sequence[Remedy]) -> list[str]:
    """Of a change, in these words, that leaves no plan: why, and what else would have to change."""
    fitting = [f"{one.words} ({seconds_text(one.step_seconds)} a step)" for one in remedies]
    return [
        f"what if   {words}: nothing fits there; the plan above, for the cluster as it is, stands",
        f"why       {why}",
        *(f"would fit {what}" for what in fitting or ["nothing, by any single change more"]),
    ]


def _stages_demanded(placement: Placement) -> list[str]:
    """Nothing where stages are on other ranks than s mod P: no option says on which."""
    stages = placement.num_stages // placement.num_pipeline_ranks
    return [f"--stages-per-rank {stages}"] if placement.is_modular else []


def _demands(placement: Placement) -> str:
    """Options of lga-plan under which the placement's family is all that is left."""
    words = [
        f"--schedule {placement.schedule.value}",
        f"--replicas {placement.num_replicas}",
        f"--pipeline-ranks {placement.num_pipeline_ranks}",
        *_stages_demanded(placement),
        f"--micro-batches {placement.num_micro_batches}",
        f"--partition {placement.partition}",
    ]
    if placement.partition_group_size:
        words.append(f"--partition-within {placement.partition_group_size}")
    if len(set(placement.recompute)) == 1:
        words.append("--recompute" if placement.recompute[0] else "--no-recompute")
    words += ["--offload-state"] * placement.offload_state
    words += ["--offload-inputs"] * placement.offload_inputs
    return " ".join(words)


def offers_table(offers: Sequence[Resolved], step_seconds: float) -> Table:
    """A row per change: what it would buy, solved again."""
    table = plain_table("what more would buy, solved again", ["change"], ["step", "gain"])
    table.add_column("plan")
    for offer in offers:
        if offer.placement is None or offer.step_seconds is None:
            table.add_row(offer.words, "-", "-", f"none: {offer.why_none}")
            continue
        gain = 1 - offer.step_seconds / step_seconds if step_seconds else 0.0
        words = f"{gain:.1%}" if gain > 0.0005 else "nothing" if gain > -0.0005 else "slower"
        table.add_row(
            offer.words, seconds_text(offer.step_seconds), words, placement_text(offer.placement)
        )
    return table


def families_table(verdicts: Sequence[Verdict], step_seconds: float) -> Table:
    """A row per family: its best plan, and why it lost."""
    table = plain_table("the best plan of each family", ["family"], ["step", "ratio"])
    table.add_column("its best plan")
    table.add_column("why not")
    axis = None
    for verdict in verdicts:
        family, placement = verdict.result.family, verdict.result.placement
        if axis is not None and family.axis is not axis:
            table.add_row()
        axis = family.axis
        if placement is None or verdict.ratio is None:
            table.add_row(family.name, "-", "-", "none", verdict.result.why_none)
            continue
        table.add_row(
            family.name,
            seconds_text(verdict.result.step_seconds or 0.0),
            f"{verdict.ratio:.3f}",
            placement_text(placement),
            _reason(verdict, step_seconds),
        )
    return table


def sides_table(title: str, sides: Mapping[str, Side]) -> Table:
    """Plans side by side: a column per plan, by its name."""
    table = plain_table(title, [""], [*sides])
    rows = [_side_rows(side) for side in sides.values()]
    for label in rows[0]:
        values = [row[label] for row in rows]
        table.add_row(label, *values, style="" if len(set(values)) > 1 else "dim")
    return table


def placement_text(placement: Placement) -> str:
    """`2 x 4 x 3, batch 8 x 1, layered, recompute all`: mesh x loops, batch, schedule, the rest."""
    loops = str(placement.num_stages // placement.num_pipeline_ranks)
    if not placement.is_modular:
        loops = (
            f"({placement.num_stages} stages on ranks {', '.join(map(str, placement.stage_ranks))})"
        )
    words = [
        f"{placement.num_replicas} x {placement.num_pipeline_ranks} x {loops}",
        f"batch {placement.num_micro_batches} x {placement.micro_batch_size}",
        placement.schedule.value,
    ]
    if placement.num_replicas > 1:
        state = partition_text(placement.partition, placement.partition_group_size)
        words.append(f"partition {state}")
    if any(placement.recompute):
        words.append(f"recompute {_recompute_text(placement.recompute)}")
    words += ["state offloaded"] * placement.offload_state
    words += ["inputs offloaded"] * placement.offload_inputs
    words += [f"groups of {placement.group_size}"] * bool(placement.group_size)
    return ", ".join(words)


def _recompute_text(recompute: Sequence[bool]) -> str:
    return "all" if all(recompute) else f"{sum(recompute)} of {len(recompute)} stages"


def _reason(verdict: Verdict, step_seconds: float) -> str:
    if verdict.is_plan:
        return "is the plan"
    difference = ((verdict.ratio or 1.0) - 1) * step_seconds
    if abs(difference) <= _SMALL * step_seconds:
        return "as fast"
    sign = 1 if difference > 0 else -1
    losses = [
        loss
        for loss in verdict.losses
        if sign * loss.more_seconds > max(_SMALL * step_seconds, 0.05 * abs(difference))
    ]
    losses.sort(key=lambda loss: -sign * loss.more_seconds)
    words = [_loss_text(loss, step_seconds) for loss in losses[:_MAX_LOSSES]]
    return ("" if sign > 0 else "faster: ") + "; ".join(words)


def _loss_text(loss: Loss, step_seconds: float) -> str:
    more = "more" if loss.more_seconds > 0 else "less"
    name = _LOSSES.get(loss.part, loss.part)
    seconds = abs(loss.more_seconds)
    return f"{seconds_text(seconds)} {more} {name} ({_share(seconds, step_seconds)} of the step)"


def _shares_text(shares: Shares, step: float) -> str:
    compute = ", ".join(
        f"{name} {_share(seconds, step)}" for name, seconds in shares.compute.items() if seconds
    )
    parts = [f"{_share(shares.compute_seconds, step)} compute ({compute})"]
    for name, seconds in shares.waiting.items():
        if seconds > 0.0005 * step:
            parts.append(f"{_share(seconds, step)} waiting for {name}")
    parts.append(f"{_share(shares.bubble_seconds, step)} waiting for other ranks (pipeline fill)")
    if shares.end_seconds > 0.0005 * step:
        parts.append(f"{_share(shares.end_seconds, step)} after its last compute")
    return "; ".join(parts)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _side_rows(side: Side) -> dict[str, str]:
    plan, simulation = side.plan, side.simulation
    step, shares = simulation.step_seconds, side.shares
    recompute = [stage.recompute for stage in plan.stages]
    return {
        "step": seconds_text(step),
        "time per sample": seconds_text(step / plan.global_batch_size),
        "bubble": f"{simulation.bubble:.1%}",
        "compute": _share(shares.compute_seconds, step),
        "exposed communication": _share(shares.waiting_seconds, step),
        "fullest rank": bytes_text(max(simulation.peak_bytes)),
        "cluster": plan.cluster.name,
        "devices": str(plan.world_size),
        "replicas x pipeline ranks": f"{plan.num_replicas} x {plan.num_pipeline_ranks}",
        "stages": str(plan.num_stages),
        "micro-batches": f"{plan.num_micro_batches} of {plan.micro_batch_size}",
        "batch": str(plan.global_batch_size),
        "schedule": plan.schedule.value,
        "partition": partition_text(plan.partition, plan.partition_group_size),
        "recompute": _recompute_text(recompute) if any(recompute) else "none",
        "state": "in host memory" if plan.offload_state else "on the device",
        "updates": "on the host" if plan.options.update_on_host else "on the device",
        "largest stage": f"{max(len(stage.layers) for stage in plan.stages)} layers",
    }
