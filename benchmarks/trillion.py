"""Days to train a model of a trillion parameters, row by row: `python benchmarks/trillion.py`.

The model is X_160 of the family in arXiv:2106.02679 (Lamy-Poirier, "Layered gradient accumulation
and modular pipeline parallelism", 2021): x layers of width x^2, sequences of 16 x tokens, 12 x^5
parameters, a critical batch of 82 x^(2/3) sequences, 100 000 steps. Layers are an analytic profile
(8 flop per parameter and token: forward, recompute, and backward of twice the forward), devices are
A100s at their peak, and nothing takes time but products and transfers.

Bubbles are those of lowered and simulated plans. The reference figures are our calculation from the
stated rules, not the paper's word: overheads add up there, transfers that can hide do hide. With
--links the same plans are simulated once more with gathers, reductions, pipeline transfers and
updates, where overheads multiply and what does not hide is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click
from rich.console import Console
from rich.table import Table
from trillion_model import (
    BATCH,
    ETHERNET,
    NUM_LAYERS,
    PARAMETERS_PER_LAYER,
    SIZE,
    Row,
    cluster_of,
    device,
    seconds_of_layer,
    simulate_row,
)

from planner.schedules import Schedule
from planner.simulate import Simulation

NUM_STEPS = 100_000
DAY_SECONDS = 86_400.0
ROWS = (
    Row(name="one GPU", num_micro_batches=BATCH, reference_days=632 * 365.25),
    Row(name="data", num_replicas=483, num_micro_batches=5, reference_days=478.0),
    Row(
        name="data + pipeline", num_replicas=483, num_pipeline_ranks=5, num_micro_batches=5,
        reference_days=98.0,
    ),
    Row(
        name="data + tensor", num_replicas=483, tensor_degree=16, num_micro_batches=5,
        reference_days=33.0,
    ),
    Row(
        name="3D, contiguous pipeline, replicated state", num_replicas=14,
        num_pipeline_ranks=160, tensor_degree=16, num_micro_batches=172, partition=0,
        schedule=Schedule.ONE_F_ONE_B, reference_days=13.06,
    ),
    Row(
        name="3D, layered, modular, partitioned", num_replicas=483, num_pipeline_ranks=5,
        tensor_degree=16, num_micro_batches=5, reference_days=6.77,
    ),
    Row(
        name="the same on 25 Gb/s Ethernet", num_replicas=60, num_pipeline_ranks=40,
        tensor_degree=16, num_micro_batches=40, network=ETHERNET, reference_days=8.1,
    ),
)  # fmt: skip
REFERENCE_GB = {"state": 0.39, "buffers": 2.95, "stored inputs": 1.31, "activations": 1.4}
REFERENCE_CHECKPOINT = 66.5e6
"""Bytes per second and GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Of one row, as parts of the ideal time."""

    ideal_days: float
    """Compute alone, divided evenly."""
    bubble: float
    """Of the simulated plan, transfers free."""
    tensor: float
    """All-reduces of tensor parallelism."""

    @property
    def days(self) -> float:
        """As the reference adds them: the all-reduces do not lengthen the bubble."""
        return self.ideal_days * (1 + self.bubble + self.tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOverheads:
    """What the simulator adds to a row where links take time; parts of the ideal time."""

    ahead: float
    """Recompute does not wait for the gradient, so it fills part of the bubble; negative."""
    product: float
    """The bubble is as long as the stages, all-reduces included: bubble x tensor."""
    pipeline: float
    """Transfers between stages that nothing hides."""
    state: float
    """Gathers, reductions and updates that nothing hides."""
    days: float
    """All overheads together."""
    simulation: Simulation


def overheads(row: Row) -> Overheads:
    """Ideal days, and the overheads that the reference names."""
    forward, backward, tensor = seconds_of_layer(row.tensor_degree)
    per_micro_batch = 2 * forward + backward  # recompute is a second forward
    compute = NUM_LAYERS * row.num_micro_batches * per_micro_batch
    ideal_seconds = compute / row.num_pipeline_ranks
    bubble = 0.0
    if row.num_pipeline_ranks > 1:
        alone = replace(row, num_replicas=1, partition=0)
        step = simulate_row(alone, cluster_of(alone, None), 0.0, ahead=False).step_seconds
        bubble = step / ideal_seconds - 1
    return Overheads(
        ideal_days=ideal_seconds * NUM_STEPS / DAY_SECONDS,
        bubble=bubble,
        tensor=tensor / per_micro_batch,
    )


def link_overheads(row: Row, known: Overheads) -> LinkOverheads:
    """The same plans where links take their time, all-reduces within the stages."""
    _, _, tensor = seconds_of_layer(row.tensor_degree)
    ideal_seconds = known.ideal_days * DAY_SECONDS / NUM_STEPS
    within = (1 + known.bubble) * (1 + known.tensor)
    alone = replace(row, num_replicas=1, partition=0)
    free = with_transfers = within
    if row.num_pipeline_ranks > 1:
        free = simulate_row(alone, cluster_of(alone, None), tensor).step_seconds / ideal_seconds
        transfers = simulate_row(alone, cluster_of(alone, row.network), tensor)
        with_transfers = transfers.step_seconds / ideal_seconds
    simulation = simulate_whole(row)
    whole = simulation.step_seconds / ideal_seconds
    return LinkOverheads(
        ahead=free - within,
        product=known.bubble * known.tensor,
        pipeline=with_transfers - free,
        state=whole - with_transfers,
        days=known.ideal_days * whole,
        simulation=simulation,
    )


def simulate_whole(row: Row, *, num_gradient_buffers: int = 2) -> Simulation:
    """The row with everything: replicas, partition, updates, and links that take their time."""
    _, _, tensor = seconds_of_layer(row.tensor_degree)
    cluster = cluster_of(row, row.network, device())
    return simulate_row(row, cluster, tensor, num_gradient_buffers=num_gradient_buffers)


def memory_gb(simulation: Simulation) -> dict[str, float]:
    """Of the fullest rank, in the reference's classes."""
    moment = max(simulation.memory, key=lambda memory: memory.total_bytes)
    state = moment.weights + moment.optimizer
    return {
        "state": state / 1e9,
        "buffers": (moment.buffers + moment.gradients) / 1e9,
        "stored inputs": moment.stored_inputs / 1e9,
        "activations": (moment.activations + moment.transient) / 1e9,
    }


def checkpoint_rate(row: Row, days: float) -> float:
    """Bytes per second and GPU, where every step's state is written out: 12 per parameter."""
    state_bytes = 12 * NUM_LAYERS * PARAMETERS_PER_LAYER / row.num_gpus
    return state_bytes / (days * DAY_SECONDS / NUM_STEPS)


@click.command()
@click.option("--links", is_flag=True, help="Simulate gathers, reductions and transfers too.")
def main(links: bool) -> None:
    """Print a row per strategy, then memory and checkpoints of the layered one."""
    console = Console()
    found = [overheads(row) for row in ROWS]
    console.print(_table(found))
    layered = next(index for index, row in enumerate(ROWS) if row.name.startswith("3D, layered"))
    rate = checkpoint_rate(ROWS[layered], found[layered].days)
    console.print(
        f"real-time checkpoint of the layered row: {rate / 1e6:.1f} MB/s per GPU (reference "
        f"{REFERENCE_CHECKPOINT / 1e6:.1f})\n"
    )
    rows = range(1, len(ROWS)) if links else (layered,)
    linked = {index: link_overheads(ROWS[index], found[index]) for index in rows}
    console.print(_link_table(found, linked))
    three = simulate_whole(ROWS[layered], num_gradient_buffers=1)
    console.print(_memory_table(three, linked[layered].simulation))


def _table(found: Sequence[Overheads]) -> Table:
    table = Table(title=f"X_{SIZE}: {NUM_LAYERS * PARAMETERS_PER_LAYER:.4g} parameters, A100s")
    columns = (
        "strategy", "replicas x pipeline x tensor", "M", "GPUs", "ideal days", "bubble", "tensor",
        "days", "reference", "deviation",
    )  # fmt: skip
    _add_columns(table, columns)
    for row, parts in zip(ROWS, found, strict=True):
        table.add_row(
            row.name,
            f"{row.num_replicas} x {row.num_pipeline_ranks} x {row.tensor_degree}",
            str(row.num_micro_batches),
            str(row.num_gpus),
            _days(parts.ideal_days),
            f"{parts.bubble:.2%}",
            f"{parts.tensor:.2%}",
            _days(parts.days),
            _days(row.reference_days),
            f"{parts.days / row.reference_days - 1:+.2%}",
        )
    return table


def _link_table(found: Sequence[Overheads], linked: dict[int, LinkOverheads]) -> Table:
    table = Table(title="the same plans simulated with links that take their time")
    columns = (
        "strategy", "network", "bubble", "tensor", "bubble x tensor", "early recompute",
        "pipeline transfers", "gathers, reductions, updates", "days",
    )  # fmt: skip
    _add_columns(table, columns)
    for index, parts in linked.items():
        shares = (
            found[index].bubble, found[index].tensor, parts.product, parts.ahead, parts.pipeline,
            parts.state,
        )  # fmt: skip
        row = ROWS[index]
        cells = [f"{share:.2%}" for share in shares]
        table.add_row(row.name, row.network.name, *cells, _days(parts.days))
    return table


def _memory_table(three: Simulation, four: Simulation) -> Table:
    """With three buffers, as the reference has it, and with the four of the rows above."""
    table = Table(title="memory per GPU of the layered row, GB")
    _add_columns(table, ("held for", "three buffers", "four buffers", "reference"))
    held = memory_gb(three), memory_gb(four)
    for name, reference in REFERENCE_GB.items():
        table.add_row(name, *(f"{gb[name]:.2f}" for gb in held), f"{reference:.2f}")
    together = [f"{sum(gb.values()):.2f}" for gb in (*held, REFERENCE_GB)]
    table.add_row("together", *together)
    steps = [f"{simulation.step_seconds:.2f} s" for simulation in (three, four)]
    table.add_row("step", *steps, "-")
    return table


def _add_columns(table: Table, columns: Sequence[str]) -> None:
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")


def _days(days: float) -> str:
    """Years where there are many."""
    return f"{days / 365.25:.1f} years" if days > 10_000 else f"{days:.2f}"


if __name__ == "__main__":
    main()
