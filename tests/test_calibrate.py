"""Calibration: rows in, parameters out, and what the fitted device then predicts."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from planner.calibrate import (
    COLUMNS,
    MOST_ROWS,
    MeasuredStep,
    Surroundings,
    calibrate,
    choose_rows,
    machine_of,
    one_forward_one_backward_seconds,
    read_steps,
    step_seconds,
)
from planner.calibrate.gpt import GptShape, gpt_head, gpt_layer
from planner.calibrate.known import calibrated_cluster, calibrated_text, start
from planner.cli.profile import main
from planner.cluster.description import read_cluster
from planner.errors import UsageError
from planner.export.skeleton import StageCosts, chain_model, ideal_cluster
from planner.lower import lower
from planner.plan.types import PlanOptions
from planner.profile import OperatorClass
from planner.schedules import Schedule
from planner.simulate import simulate
from planner.solve.types import Placement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import vtrain  # noqa: E402

VALUES = {
    "compute_efficiency": 0.75,
    "half_flop": 9e9,
    "memory_efficiency": 0.8,
    "launch_seconds": 3e-5,
    "misaligned_efficiency": 0.5,
    "latency_seconds": 3e-5,
    "skew_seconds": 1.5e-5,
    "ends_seconds": 4e-3,
    "step_seconds": 3e-3,
}


def known() -> Surroundings:
    return start("a100-80", "ib-edr-100").known


def step(**changes: float) -> MeasuredStep:
    row = MeasuredStep(
        gpus=1,
        global_batch=4,
        micro_batch_size=1,
        hidden=1024,
        heads=16,
        layers=12,
        sequence=1024,
        tensor=1,
        data=1,
        pipeline=1,
        step_ms=1.0,
    )
    row = dataclasses.replace(row, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(row, gpus=row.tensor * row.data * row.pipeline)


def many_steps() -> list[MeasuredStep]:
    machine = machine_of(VALUES, known())
    rows = [
        step(hidden=hidden, tensor=tensor, pipeline=pipeline, data=data, micro_batch_size=size)
        for hidden in (1024, 4096)
        for tensor, data, pipeline in ((1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 4, 1), (1, 2, 4))
        for size in (1, 2, 8)
    ]
    rows = [
        dataclasses.replace(row, global_batch=row.data * row.micro_batch_size * 2) for row in rows
    ]
    return [dataclasses.replace(r, step_ms=step_seconds(r, machine) * 1e3) for r in rows]


def write(path: Path, rows: list[MeasuredStep]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*reversed(COLUMNS), "remark"])
        table.writeheader()
        table.writerows({**dataclasses.asdict(row), "remark": "made"} for row in rows)
    return path


def test_known_parameters_are_found_again() -> None:
    rows = many_steps()
    fit = calibrate([rows[index] for index in choose_rows(rows, MOST_ROWS)], known())
    off = [abs(step_seconds(row, fit.machine) * 1e3 / row.step_ms - 1) for row in rows]
    assert sum(off) / len(off) < 0.01
    assert max(off) < 0.04
    for name in ("compute_efficiency", "launch_seconds", "latency_seconds"):
        assert fit.values[name] == pytest.approx(VALUES[name], rel=0.1), name


def test_one_row_moves_the_prediction_towards_it_and_no_parameter_far() -> None:
    row = step(step_ms=200.0)
    before = calibrate([dataclasses.replace(row, step_ms=100.0)], known())
    after = calibrate([row], known())
    assert step_seconds(row, before.machine) < step_seconds(row, after.machine)
    assert all(value > 0 for value in after.values.values())


@pytest.mark.parametrize("number", [0, MOST_ROWS + 1])
def test_a_calibration_takes_one_to_twenty_rows(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 20"):
        calibrate([step()] * number, known())


def test_rows_are_chosen_without_their_times_and_differ() -> None:
    rows = many_steps()
    chosen = choose_rows(rows, 8)
    assert len(set(chosen)) == 8
    assert chosen == choose_rows([dataclasses.replace(row, step_ms=1.0) for row in rows], 8)
    assert choose_rows(rows[:3], 20) == [0, 1, 2]
    assert len({tuple(choose_rows(rows, 8, seed)) for seed in range(5)}) > 1
    assert {rows[index].hidden for index in chosen} == {1024, 4096}


def test_every_number_of_a_step_at_one() -> None:
    smallest = MeasuredStep(
        **dict.fromkeys((name for name in COLUMNS if name != "step_ms"), 1), step_ms=1.0
    )
    machine = machine_of(VALUES, known())
    least = VALUES["step_seconds"] + VALUES["ends_seconds"]
    assert least < step_seconds(smallest, machine) < 3 * least


def test_more_work_never_takes_less_time() -> None:
    machine = machine_of(VALUES, known())
    row = step(hidden=2048, layers=8, pipeline=2, data=2, tensor=2)
    for change in ({"hidden": 4096}, {"layers": 16}, {"sequence": 2048}, {"global_batch": 8}):
        assert step_seconds(dataclasses.replace(row, **change), machine) > step_seconds(
            row, machine
        )


def test_a_network_slows_what_leaves_the_host() -> None:
    machine = machine_of(VALUES, known())
    small = dataclasses.replace(machine, num_host_devices=4)
    row = step(hidden=4096, data=8, global_batch=8)
    assert step_seconds(row, small) > step_seconds(row, machine)
    assert step_seconds(step(), small) == step_seconds(step(), machine)


def test_the_layers_flop_are_the_papers() -> None:
    """Narayanan et al., SC 2021, appendix: 24 b s h^2 + 4 b s^2 h forward, twice that backward."""
    for tensor in (1, 4):
        shape = GptShape(hidden=512, heads=8, sequence=128, micro_batch_size=3, tensor=tensor)
        layer = gpt_layer(shape)
        forward = 24 * 3 * 128 * 512**2 + 4 * 3 * 128**2 * 512
        assert layer.forward_flop * tensor == forward
        assert layer.backward_flop * tensor == 2 * forward
        assert len(layer.forward_all_reduce_bytes) == (2 if tensor > 1 else 0)


def test_a_vocabulary_is_padded_where_it_is_split_and_odd_rows_cost_more() -> None:
    shape = GptShape(hidden=512, heads=8, sequence=128, micro_batch_size=1, tensor=1)
    assert shape.rank_vocabulary == 50257
    assert dataclasses.replace(shape, tensor=2).rank_vocabulary * 2 == 50432
    odd, even = gpt_head(shape, 0.5), gpt_head(dataclasses.replace(shape, vocabulary=50256), 0.5)
    assert odd.forward_flop == pytest.approx(2 * even.forward_flop, rel=1e-3)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 3), (2, 4), (4, 8), (4, 1)])
@pytest.mark.parametrize("last", [1.0, 2.5])
def test_the_closed_form_is_the_simulators(ranks: int, micro_batches: int, last: float) -> None:
    """1F1B with equal stages, and with a longer last one (the head)."""
    forward = [1.0] * (ranks - 1) + [last]
    backward = [2 * seconds for seconds in forward]
    costs = StageCosts(
        forward_seconds=forward, backward_seconds=backward, backward_weight_seconds=forward
    )
    graph, profile = chain_model(ranks, costs)
    placement = Placement(
        num_replicas=1,
        num_pipeline_ranks=ranks,
        boundaries=tuple(range(ranks + 1)),
        stage_ranks=tuple(range(ranks)),
        micro_batch_size=1,
        num_micro_batches=micro_batches,
        partition=0,
        recompute=(False,) * ranks,
        schedule=Schedule.ONE_F_ONE_B,
    )
    plan = lower(graph, profile, ideal_cluster(ranks), placement, PlanOptions())
    stages = [sum(pair) for pair in zip(forward, backward, strict=True)]
    closed = one_forward_one_backward_seconds(stages, micro_batches)
    assert simulate(plan).step_seconds == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("step_ms", "step_s", "no column step_ms"),
        (",1024,", ",-1024,", "'-1024' is not a whole number above 0"),
        (",1024,", ",1024.5,", "is not a whole number above 0"),
        (",88.5", ",nan", "step_ms = 'nan' is not a number above 0"),
        (",88.5", ",0", "step_ms = '0' is not a number above 0"),
        (",88.5", "", "step_ms = '' is not a number above 0"),
        ("2,2,1", "3,2,1", "tensor x data x pipeline is 2, but gpus is 3"),
        ("2,2,1", "2,3,2", "does not divide 3"),
        (",16,16,", ",15,16,", "does not divide 1024"),
        (",16,16,", ",16,1,", "1 layers on 2 pipeline stages"),
        (",88.5", ",1e300", "step_ms = '1e300' is not between 0.001 and 1e+09"),
        (",1024,", ",1e300,", "hidden = '1e300' is not between 1 and"),
        ("2,2,1,", "2e12,2e12,1,", "gpus = '2e12' is not between 1 and 8192"),
        ("2,2,1,", f"{'9' * 200_000},2,1,", "field larger than field limit"),
        ("step_ms", "step_ms,step_ms", "column step_ms twice"),
        ("2,2,1,1024,16,16,1024,1,1,2,88.5\n", "", "holds no measured step"),
        ("88.5\n", "88.5\n" + "2,2,1,1024,16,16,1024,1,1,2,88.5\n" * 5000, "5001 measured steps"),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = ",".join(COLUMNS) + "\n2,2,1,1024,16,16,1024,1,1,2,88.5\n"
    path = tmp_path / "measured.csv"
    path.write_text(text)
    assert len(read_steps(path)) == 1
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        read_steps(path)
    assert words in caught.value.message
    assert caught.value.hint


def test_the_written_cluster_reads_back_as_fitted(tmp_path: Path) -> None:
    begun = start("a100-80", "ib-edr-100")
    rows = many_steps()[:12]
    fit = calibrate(rows, begun.known)
    path = tmp_path / "a100.yaml"
    path.write_text(calibrated_text(fit, calibrated_cluster(fit, begun, 11, "made"), "command"))
    cluster = read_cluster(path, 11)
    assert [host.num_devices for host in cluster.hosts] == [8, 3]
    device, fitted = cluster.device(0), fit.machine.device
    assert device.rates[OperatorClass.PRODUCT].half_flop == pytest.approx(
        fit.values["half_flop"], rel=1e-3
    )
    assert device.launch_seconds == pytest.approx(fitted.launch_seconds, rel=1e-3)
    assert device.compute_efficiency == pytest.approx(fitted.compute_efficiency, rel=1e-3)
    assert cluster.hosts[0].link.latency_seconds == pytest.approx(
        fit.values["latency_seconds"], rel=1e-3
    )
    assert cluster.network.bandwidth == pytest.approx(begun.known.network.bandwidth)
    assert cluster.collectives == "tree"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lga-profile"), *words]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_calibrates_and_says_what_it_chose(tmp_path: Path) -> None:
    write(tmp_path / "measured.csv", many_steps())
    done = run(tmp_path, "--calibrate", "measured.csv", "--output", "a100.yaml")
    assert done.returncode == 0, done.stderr
    assert "20 of 30 chosen" in done.stdout
    assert "of the other 10" in done.stdout
    written = yaml.safe_load((tmp_path / "a100.yaml").read_text())
    fitted = written["hosts"][0]["device"]["launch_seconds"]
    assert fitted["value"] == pytest.approx(VALUES["launch_seconds"], rel=0.1)
    assert "20 measured steps of measured.csv" in fitted["source"]
    assert read_cluster(tmp_path / "a100.yaml", 8).num_devices == 8


def test_the_command_refuses_in_words_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.csv").write_text("gpus\n1\n")
    os.mkfifo(tmp_path / "pipe.csv")
    monkeypatch.chdir(tmp_path)
    for words, refusal in (
        (["bad.csv"], "no column global_batch"),
        (["none.csv"], "none.csv does not exist"),
        (["pipe.csv"], "pipe.csv is not a file"),
        (["bad.csv", "--output", "pipe.csv"], "it is no regular file"),
        (["bad.csv", "--device", "a1000"], "unknown device 'a1000'"),
        (["bad.csv", "--output", "bad.csv"], "it is an input of this command"),
    ):
        done = CliRunner().invoke(main, ["--calibrate", *words])
        assert done.exit_code == 2
        assert refusal in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "pipe.csv"]


@pytest.fixture
def published() -> list[MeasuredStep]:
    folder = Path(os.environ.get("LGA_DATA", "")) / "vtrain"
    if "LGA_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("LGA_DATA names no folder with the public tables of vtrain")
    return [row for name in ("single", "multi") for row in read_steps(folder / f"{name}_host.csv")]


def test_published_steps_are_predicted_from_twenty(published: list[MeasuredStep]) -> None:
    chosen = choose_rows(published, MOST_ROWS)
    predicted, _ = vtrain.predict(published, chosen, range(len(published)))
    scores = vtrain.score(published, predicted, chosen)
    assert len(chosen) <= 20
    assert scores.tensor_1 <= 0.07
    assert scores.all_rows <= 0.09
    assert scores.regret <= 0.03


@pytest.mark.slow
def test_published_groups_are_predicted_from_other_groups(published: list[MeasuredStep]) -> None:
    scores = vtrain.held_out(published, MOST_ROWS, seed=1)
    assert scores.tensor_1 <= 0.07
    assert scores.all_rows <= 0.09
    assert scores.regret <= 0.035


def test_the_benchmark_runs_on_given_tables(tmp_path: Path) -> None:
    table = write(tmp_path / "made.csv", many_steps())
    command = [sys.executable, str(ROOT / "benchmarks" / "vtrain.py"), str(table), "--rounds", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert "groups held out" in done.stdout
