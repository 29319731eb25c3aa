"""The plan file: exact round trip, and a clear refusal of everything else."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_corruptions import sealed
from synthetic import chain_cluster, chain_graph, chain_placement, chain_plan, chain_profile

from planner.errors import PlanFileError
from planner.lower import lower
from planner.plan import file, sections
from planner.plan.file import MAX_PLAN_BYTES, parse_plan, print_plan, read_plan, write_plan
from planner.plan.types import Plan, PlanOptions, Prediction


def small_plan(*, num_stages: int = 4, recompute: bool = False, partition: int = 0) -> Plan:
    graph = chain_graph(num_stages, tied=[(0, num_stages - 1)], num_random_operators=2)
    placement = chain_placement(
        num_stages, 2, 3, num_replicas=2, recompute=recompute, partition=partition
    )
    cluster = chain_cluster(4)
    return lower(graph, chain_profile(graph), cluster, placement, PlanOptions(seed=7))


@pytest.mark.parametrize("partition", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_parse_of_print_is_the_plan(partition: int, recompute: bool) -> None:
    plan = small_plan(partition=partition, recompute=recompute)
    assert parse_plan(print_plan(plan)) == plan


def test_the_smallest_plan() -> None:
    graph = chain_graph(1)
    placement = chain_placement(1, 1, 1)
    plan = lower(graph, chain_profile(graph), chain_cluster(1), placement, PlanOptions())
    assert parse_plan(print_plan(plan)) == plan


def test_prediction_and_odd_floats_survive() -> None:
    prediction = Prediction(
        step_seconds=0.1 + 0.2,
        bubble=1e-17,
        peak_bytes=(1, 2**60),
        memory_limit_bytes=2**61,
        provenance="simulated: 'quotes', \"more\", # no comment,\nsecond line, é 漢 🙂",
    )
    plan = replace(small_plan(), prediction=prediction)
    assert parse_plan(print_plan(plan)) == plan


def test_programs_stand_one_instruction_per_line() -> None:
    plan = small_plan()
    lines = print_plan(plan).splitlines()
    num_forwards = sum(line.startswith("  compute  FORWARD") for line in lines)
    num_programs = 2  # of training and of evaluation
    assert num_forwards == num_programs * plan.num_stages * plan.num_micro_batches


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("num_micro_batches: 3", "num_micro_batches: 4", "num_micro_batches"),
        ("stage 1 micro_batch 0", "stage 1 micro_batch 1", "programs"),
        ("seed: 7", "seed: 8", "options"),
        ("micro_batch_size: 1\n", "", "micro_batch_size"),
        ("partition: 0\n", "partition: 0\nextra: 1\n", "extra"),
        ("fingerprint: ", "fingerprint:  ", "fingerprint"),
    ],
)
def test_an_edit_is_found_and_named(old: str, new: str, section: str) -> None:
    text = print_plan(small_plan())
    assert old in text
    with pytest.raises(PlanFileError, match=f"'{section}'") as caught:
        parse_plan(text.replace(old, new, 1))
    assert caught.value.exit_code == 2


def test_a_file_cut_short_anywhere_is_refused() -> None:
    text = print_plan(small_plan())
    for length in range(0, len(text) - 1, 97):
        with pytest.raises(PlanFileError):
            parse_plan(text[:length])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_character_is_refused(data: st.DataObject) -> None:
    text = print_plan(small_plan(num_stages=2))
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(codec="utf-8").filter(lambda c: c != text[place]))
    with pytest.raises(PlanFileError):
        parse_plan(text[:place] + letter + text[place + 1 :])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_micro_batches: 3", "num_micro_batches: three", "num_micro_batches"),
        ("num_micro_batches: 3", "num_micro_batches: 0", "less than 1"),
        ("num_micro_batches: 3", "num_micro_batches: 3.5", "num_micro_batches"),
        ("  seed: 7", "  seed: 7\n  extra: 1", "extra"),
        ("  seed: 7", "  seed: '7'", "seed"),
        ("stage 1 micro_batch 0", "stage 9 micro_batch 0", "stage 9"),
        ("stage 1 micro_batch 0", "stage 1 micro_batch 9", "micro-batch 9"),
        ("compute  FORWARD ", "compute  FOREWARD", "is not an instruction"),
        ("peer 1", "peer 7", "peer 7"),
        ("to.1     SEND", "to.1     SAVE", "refers to unit None"),
        (": h_0.0\n", ": h_77.0\n", "no buffer h_77.0"),
        (": h_0.0\n", ": saved:0.0\n", "no tensor between stages"),
        ("bandwidth: 1.0e+30", "bandwidth: 0.0", "bandwidth"),
        ("layer('layer.0')", "__import__('os').system", "not allowed"),
        ("layer('layer.0')(x)", "layer('layer.0')(x", "not Python syntax"),
        ("dtype: float32", "dtype: float99", "float99"),
        ("fingerprint: chain-4-1", "fingerprint: !!python/name:os.system ''", "uses tags"),
        ("fingerprint: chain-4-1", "fingerprint: &a chain-4-1", "uses tags, anchors"),
        ("fingerprint: chain-4-1", "fingerprint: *a", "uses tags, anchors"),
        ("fingerprint: chain-4-1", "fingerprint: " + "[" * 100000, "nests too deeply"),
        ("fingerprint: chain-4-1", "fingerprint: x\n---\nfingerprint: y", "does not match"),
        ("micro_batch_size: 1", f"micro_batch_size: {2**21}", "more than the"),
        ("num_micro_batches: 3", f"num_micro_batches: {10**6}", "passes"),
        ("num_devices: 4", f"num_devices: {10**12}", "devices"),
        ("shape: [1, 1]", f"shape: [{10**9}, {10**9}]", "larger than"),
        ("saved_bytes: 0", f"saved_bytes: {2**60}", "saved_bytes"),
        ("deadline_seconds: 300.0", "deadline_seconds: .nan", "deadline_seconds"),
        ("seed: 7", f"seed: {10**30}", "seed"),
    ],
)
def test_a_resealed_forgery_is_still_refused(old: str, new: str, message: str) -> None:
    text = print_plan(small_plan())
    assert old in text
    forged = sealed(text.replace(old, new, 1))
    with pytest.raises(PlanFileError) as caught:
        parse_plan(forged)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "\0", "hello", "a: 1\n", "lga_plan: 2", "lga_plan: 2\n\n", "lga_plan: x\n",
             "lga_plan: 2\nchecksums: {}\n", "lga_plan: 2\nchecksums: {a: 0}\na: 1\n"],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError):
        parse_plan(text)


def test_another_format_version_is_refused() -> None:
    text = print_plan(small_plan()).replace("lga_plan: 3", "lga_plan: 4", 1)
    with pytest.raises(PlanFileError, match="version 4"):
        parse_plan(text)


def test_write_then_read(tmp_path: Path) -> None:
    plan, path = small_plan(), tmp_path / "a.plan.yaml"
    write_plan(plan, path)
    assert read_plan(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["a.plan.yaml"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot write"):
        write_plan(small_plan(), tmp_path / "missing" / "a.plan.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanFileError, match="cannot write"):
        write_plan(small_plan(), tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot read"):
        read_plan(tmp_path / "missing.yaml")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="is not a plan"):
        read_plan(binary)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(PlanFileError, match="at most"):
        read_plan(large)


def test_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    plan, path = small_plan(), tmp_path / "a.plan.yaml"
    path.write_bytes(print_plan(plan).replace("\n", "\r\n").encode())
    assert read_plan(path) == plan


def test_what_is_not_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.plan.yaml")
    for path in (tmp_path / "pipe.plan.yaml", tmp_path):
        with pytest.raises(PlanFileError, match="is not a file"):
            read_plan(path)


def test_a_seal_of_any_length_is_compared_at_once() -> None:
    text = print_plan(small_plan())
    first, _, body = text.split("\n", 2)
    for seal in ("a" * 10**6, "checksums: {" + "a: 0, " * 10**6 + "}", "a: " * 10**6):
        with pytest.raises(PlanFileError, match="does not match"):
            parse_plan(f"{first}\n{seal}\n{body}")


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = print_plan(small_plan())
    monkeypatch.setattr(sections, "_MAX_EVENTS", 1000)
    with pytest.raises(PlanFileError, match="more than 1000 values"):
        parse_plan(text)


def test_too_many_lines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = print_plan(small_plan())
    monkeypatch.setattr(file, "_MAX_INSTRUCTIONS", 10)
    with pytest.raises(PlanFileError, match="more lines"):
        parse_plan(text)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    plan = replace(small_plan(), model_name="\ud800")
    with pytest.raises(PlanFileError, match="no Unicode text"):
        write_plan(plan, tmp_path / "a.plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_trillion_parameters_is_small() -> None:
    plan = chain_plan(160, 5, 5, num_replicas=2, partition=3, num_elements=10**10)
    assert sum(unit.num_elements for unit in plan.units) > 10**12
    assert len(print_plan(plan).encode()) < 10_000_000
