"""The benchmark of our plan against the families: its clusters, ratios and files."""

import io
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import families


@pytest.mark.parametrize("name", families.CLUSTERS)
def test_every_cluster_has_the_devices_it_is_named_for(name: str) -> None:
    available = int(name.rpartition("-")[2])
    assert families.cluster_of(name, 1000).num_devices == available
    small = families.cluster_of(name, 5)
    assert len(small.hosts) == (1 if available == 8 else 2)
    assert all(host.memory_bytes for host in small.hosts)


def test_every_model_has_a_file() -> None:
    assert [
        model.name for model in families.MODELS if not (families.HERE / model.path).is_file()
    ] == []


def row(family: str, seconds: float, cluster: str = "one") -> families.Row:
    return families.Row(
        model="small",
        cluster=cluster,
        num_devices=8,
        family=family,
        step_seconds=seconds,
        placement="in words, with a comma",
        cpu_seconds=0.5,
    )


ROWS = [
    row(families.OURS, 2.0), row("GPipe", 4.0), row("1F1B", 2.5),
    row(families.OURS, 3.0, "two"), row("GPipe", 2.0, "two"), row("1F1B", math.inf, "two"),
    row(families.OURS, math.inf, "three"), row("GPipe", math.inf, "three"),
]  # fmt: skip


def test_ratios_are_to_the_fastest_family() -> None:
    assert families.ratios(ROWS) == {
        ("small", "one"): 0.8, ("small", "two"): 1.5, ("small", "three"): 1.0,
    }  # fmt: skip


def test_the_table_names_the_fastest_family(tmp_path: Path) -> None:
    families.write_rows(ROWS, tmp_path / "rows.csv")
    assert families.read_rows(tmp_path / "rows.csv") == ROWS
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(families.table(ROWS))
    lines = console.export_text().splitlines()
    assert any("1F1B" in line and "0.800" in line for line in lines)
    assert any("GPipe" in line and "1.500" in line for line in lines)
    assert any("none fits" in line for line in lines)
