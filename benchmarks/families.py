"""Our plan against the best plan of every family in use: `python benchmarks/families.py`.

Six models on five clusters, each on as many devices as it is planned for or the cluster has, and on
two hosts at least where there are several. A row per pair: the simulated step of our plan, the
fastest family and its step, and the ratio, which must not exceed 1 by more than a millionth. The
families are those of `lga-plan --explain`; each is searched as long as --time-limit says. With
--output every family's step goes to a CSV file, and pairs that stand there already are not planned
again. Exits with 1 where a family wins.
"""

import csv
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
from rich.table import Table

from planner.cluster import Cluster, resolve_cluster
from planner.cluster.files import validate
from planner.cluster.schema import ClusterFile
from planner.console import HELP, SECONDS, console
from planner.errors import LgaError
from planner.explain.families import FAMILIES, best_of_family
from planner.host_memory import simulated_of
from planner.model_file import load_model_file
from planner.pipeline import find_plan
from planner.prepare import Prepared, prepare
from planner.report import seconds_text
from planner.solve import Placement, Simulated

HERE = Path(__file__).parent
OURS = "ours"
EQUAL = 1 + 1e-6
"""Ratios below it are of plans that the search takes for equally fast."""
HEADS = ("model", "cluster", "devices", "family", "step_seconds", "placement", "cpu_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model, how many devices it is planned for, and its batch."""

    name: str
    path: str
    num_devices: int
    global_batch_size: int
    sequence_length: int | None = None


MODELS = (
    Model(name="GPT-2 XL", path="models/gpt2_xl.py", num_devices=8, global_batch_size=64),
    Model(
        name="LLaMA-8B", path="../examples/llama-8b.json", num_devices=16, global_batch_size=64,
        sequence_length=4096,
    ),
    Model(name="LLaMA-70B", path="models/llama_70b.py", num_devices=64, global_batch_size=256),
    Model(name="T5-11B", path="models/t5_11b.py", num_devices=32, global_batch_size=128),
    Model(name="Mixtral", path="models/mixtral_8x7b.py", num_devices=64, global_batch_size=256),
    Model(name="U-Net", path="models/unet.py", num_devices=8, global_batch_size=64),
)  # fmt: skip
CLUSTERS = ("nvlink-8", "infiniband-64", "ethernet-64", "consumer-8", "uneven-24")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The best plan of one family, or ours."""

    model: str
    cluster: str
    num_devices: int
    family: str
    step_seconds: float
    """Infinite where nothing fits."""
    placement: str
    """In words, or why there is none."""
    cpu_seconds: float

    def fields(self) -> tuple[object, ...]:
        return (
            self.model, self.cluster, self.num_devices, self.family, self.step_seconds,
            self.placement, f"{self.cpu_seconds:.1f}",
        )  # fmt: skip


@click.command(context_settings=HELP)
@click.option("--model", "models", multiple=True, help="Only models whose name begins so.")
@click.option("--cluster", "clusters", multiple=True, help="Only clusters whose name begins so.")
@click.option("--time-limit", type=SECONDS, default=4.0, show_default=True, help="Of each family.")
@click.option("--output", type=click.Path(path_type=Path), help="CSV file of all rows.")
def main(
    models: tuple[str, ...], clusters: tuple[str, ...], time_limit: float, output: Path | None
) -> None:
    """Plan every model on every cluster, ours and every family's, and compare."""
    rows = [] if output is None or not output.exists() else read_rows(output)
    for model in MODELS:
        for name in CLUSTERS:
            wanted = model.name.startswith(models or ("",)) and name.startswith(clusters or ("",))
            known = any(row.model == model.name and row.cluster == name for row in rows)
            if wanted and not known:
                rows += compared(model, name, time_limit)
                if output is not None:
                    write_rows(rows, output)
    console.print(table(rows))
    raise SystemExit(1 if any(ratio > EQUAL for ratio in ratios(rows).values()) else 0)


def compared(model: Model, cluster_name: str, time_limit_seconds: float) -> list[Row]:
    """Ours and every family's best for one model on one cluster."""
    cluster = cluster_of(cluster_name, model.num_devices)
    path = str(HERE / model.path)
    prepared = prepare(
        load_model_file(path, sequence_length=model.sequence_length),
        num_devices=cluster.num_devices,
        cluster=cluster,
        global_batch_size=model.global_batch_size,
    )
    rows = []

    def add(family: str, step_seconds: float, words: str, started: float) -> None:
        rows.append(
            Row(
                model=model.name,
                cluster=cluster_name,
                num_devices=cluster.num_devices,
                family=family,
                step_seconds=step_seconds,
                placement=words,
                cpu_seconds=time.process_time() - started,
            )
        )

    started = time.process_time()
    add(OURS, *our_plan(prepared), started)

    @cache
    def simulated(placement: Placement) -> Simulated:
        return simulated_of(*prepared.lowered(placement))

    for family in FAMILIES:
        started = time.process_time()
        found = best_of_family(
            prepared.problem, simulated, family, time_limit_seconds=time_limit_seconds
        )
        seconds = math.inf if found.step_seconds is None else found.step_seconds
        add(family.name, seconds, str(found.placement or found.why_none), started)
    return rows


def our_plan(prepared: Prepared) -> tuple[float, str]:
    """Step and placement of what lga-plan makes; infinite with the reason where nothing fits."""
    try:
        result = find_plan(prepared, advise=False)
    except LgaError as error:
        return math.inf, error.message
    return result.solution.step_seconds, str(result.solution.placement)


def cluster_of(name: str, num_devices: int) -> Cluster:
    """So many of the cluster's devices, or all it has; two hosts at least where there are."""
    path = HERE / "clusters" / f"{name}.yaml"
    spec = validate(ClusterFile, path.read_text(encoding="utf-8"), path.name)
    sizes = [host.count for host in spec.hosts for _ in range(host.copies)]
    return resolve_cluster(str(path), min(max(num_devices, sum(sizes[:2])), sum(sizes)))


def ratios(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Our step over the best family's, by model and cluster; 1 where nothing fits at all."""
    best: dict[tuple[str, str], float] = {}
    ours: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row.model, row.cluster
        if row.family == OURS:
            ours[key] = row.step_seconds
        else:
            best[key] = min(best.get(key, math.inf), row.step_seconds)
    return {
        key: 1.0 if math.inf == seconds == best[key] else seconds / best[key]
        for key, seconds in ours.items()
    }


def table(rows: list[Row]) -> Table:
    """A row per model and cluster."""
    found = Table(title="our plan against the best plan of any family", title_justify="left")
    for head in ("model", "cluster", "GPUs", "our step", "best family", "its step", "ratio"):
        found.add_column(head, justify="left" if "family" in head else "right", no_wrap=True)
    for (model, cluster), ratio in ratios(rows).items():
        mine = [row for row in rows if (row.model, row.cluster) == (model, cluster)]
        ours, others = mine[0], mine[1:]
        best = min(others, key=lambda row: row.step_seconds)
        if best.step_seconds == math.inf:
            words = ("does not fit", "none fits", "", "")
        else:
            words = (
                seconds_text(ours.step_seconds), best.family, seconds_text(best.step_seconds),
                f"{ratio:.3f}",
            )  # fmt: skip
        found.add_row(model, cluster, str(ours.num_devices), *words)
    return found


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [
            Row(
                model=line["model"],
                cluster=line["cluster"],
                num_devices=int(line["devices"]),
                family=line["family"],
                step_seconds=float(line["step_seconds"]),
                placement=line["placement"],
                cpu_seconds=float(line["cpu_seconds"]),
            )
            for line in csv.DictReader(stream)
        ]


def write_rows(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEADS)
        writer.writerows(row.fields() for row in rows)


if __name__ == "__main__":
    main()
