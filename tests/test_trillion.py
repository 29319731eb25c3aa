"""The trillion-parameter table: days, overheads, memory and checkpoints of every strategy."""

import sys
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import trillion
import trillion_model as model

overheads = cache(trillion.overheads)
LAYERED = next(row for row in trillion.ROWS if row.name.startswith("3D, layered"))


def test_the_model_is_the_one_of_the_table() -> None:
    parameters = model.NUM_LAYERS * model.PARAMETERS_PER_LAYER
    assert parameters == 12 * 160**5 == 1_258_291_200_000
    assert (model.BATCH, model.WIDTH, model.SEQUENCE) == (
        2416,
        25600,
        2560,
    )
    layer = model.analytic_layer()
    # 8 flop per parameter and token, recompute included, and no other.
    flop = 2 * layer.forward_flop + layer.backward_flop
    assert flop == 8 * model.PARAMETERS_PER_LAYER * model.SEQUENCE


@pytest.mark.parametrize("row", trillion.ROWS, ids=lambda row: row.name)
def test_every_row_is_within_three_percent(row: model.Row) -> None:
    assert overheads(row).days == pytest.approx(row.reference_days, rel=0.03)


@pytest.mark.parametrize("row", trillion.ROWS, ids=lambda row: row.name)
def test_overheads_are_those_of_the_rules(row: model.Row) -> None:
    found = overheads(row)
    ranks = row.num_pipeline_ranks
    loops = model.NUM_LAYERS // ranks
    assert found.bubble == pytest.approx((ranks - 1) / (loops * row.num_micro_batches), abs=1e-9)
    # Four all-reduces a layer over 600 GB/s, 15/16 of the bytes out and in, twice each.
    num_bytes = 4 * 2 * 2 * 15 / 16 * model.SEQUENCE * model.WIDTH * 2
    flop = 8 * model.PARAMETERS_PER_LAYER * model.SEQUENCE / 16
    expected = 0.0 if row.tensor_degree == 1 else num_bytes / 600e9 / (flop / 312e12)
    assert found.tensor == pytest.approx(expected)
    assert found.tensor == pytest.approx(0.0 if row.tensor_degree == 1 else 520 / 4800, rel=0.07)


def test_memory_and_checkpoints_of_the_layered_row() -> None:
    held = trillion.memory_gb(trillion.simulate_whole(LAYERED, num_gradient_buffers=1))
    assert held == pytest.approx(trillion.REFERENCE_GB, rel=0.03)
    rate = trillion.checkpoint_rate(LAYERED, overheads(LAYERED).days)
    assert rate == pytest.approx(trillion.REFERENCE_CHECKPOINT, rel=0.03)


def test_what_links_add_is_accounted_for_in_full() -> None:
    known = overheads(LAYERED)
    found = trillion.link_overheads(LAYERED, known)
    parts = (known.bubble, known.tensor, found.product, found.ahead, found.pipeline, found.state)
    assert found.days == pytest.approx(known.ideal_days * (1 + sum(parts)))
    assert found.ahead < 0 < min(found.pipeline, found.state)
    # Five micro-batches hide the gathers of 200 Gb/s, and the reductions, all but a little.
    assert found.pipeline + found.state < 0.05
    step = found.simulation.step_seconds
    assert found.days == pytest.approx(step * trillion.NUM_STEPS / 86400)


@pytest.mark.slow
def test_the_command_prints_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    result = CliRunner().invoke(trillion.main, ["--links"])
    assert result.exit_code == 0, result.output
    for row in trillion.ROWS:
        assert result.output.count(row.name) >= (2 if row.num_replicas > 1 else 1)
    assert "real-time checkpoint" in result.output
    assert "three buffers" in result.output
