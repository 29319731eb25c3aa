"""Profile files: they read back equal, and whatever is wrong with one is said."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from planner.errors import UsageError
from planner.measure.clock import Seconds
from planner.measure.file import parse_profile, print_profile, read_profile, write_profile
from planner.measure.measured import (
    MeasuredDevice,
    MeasuredLayer,
    MeasuredModel,
    MeasuredSize,
    Versions,
)
from planner.profile import LayerProfile, OperatorClass, OperatorCount


def seconds(median: float) -> Seconds:
    return Seconds(median=median, spread=median / 8)


def measured_layer(*names: str, signature: str = "a", scale: float = 1.0) -> MeasuredLayer:
    count = OperatorCount(
        flop=7, moved_bytes=9, dtype="float32", num_kernels=3, kind=OperatorClass.PRODUCT
    )
    parts = {
        part: seconds(scale * value)
        for part, value in (("forward", 1e-3), ("backward", 2e-3), ("recompute", 1.5e-3),
                            ("update", 1e-5))
    }  # fmt: skip
    return MeasuredLayer(
        signature=signature,
        layers=names,
        profile=LayerProfile(
            name=names[0],
            forward=(count,),
            backward=(count, replace(count, draws=True)),
            parameter_bytes=8,
            saved_bytes=16,
            saved_tensors=("x",),
            forward_transient_bytes=32,
            backward_transient_bytes=64,
            **{f"{part}_seconds": found.median for part, found in parts.items()},
        ),
        optimizer_bytes=24,
        forward_peak_bytes=32,
        backward_peak_bytes=65,
        **parts,
    )


def measured_model() -> MeasuredModel:
    return MeasuredModel(
        model_name="a model: ünïcode, # and 'quotes'",
        fingerprint="f" * 32,
        device=MeasuredDevice(kind="cpu", name="a processor", num_threads=1, num_cores=2),
        optimizer="AdamW",
        date="2026-01-02 03:04 UTC",
        versions=Versions(python="3.11.7", torch="2.13.0", cuda=None),
        command="lga-profile 'a b.py'",
        num_repeats=1,
        sizes=(
            MeasuredSize(
                micro_batch_size=1,
                layers=(measured_layer("one"), measured_layer("two", "three", signature="b")),
            ),
            MeasuredSize(
                micro_batch_size=4,
                layers=(
                    measured_layer("one", scale=3.0),
                    measured_layer("two", "three", signature="c", scale=5.0),
                ),
            ),
        ),
    )


def test_a_profile_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "out.profile.yaml"
    write_profile(measured_model(), path)
    assert read_profile(path) == measured_model()
    assert [file.name for file in tmp_path.iterdir()] == ["out.profile.yaml"]


def test_a_profile_of_everything_optional_reads_back_equal() -> None:
    measured = measured_model()
    assert (
        parse_profile(print_profile(replace(measured, sizes=measured.sizes[:1]))).sizes
        == (measured.sizes[:1])
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lga_profile: 2", "lga_profile: 1", "has version 1"),
        ("lga_profile: 2", "lga_plan: 1", "it has no key lga_profile"),
        ("lga_profile: 2", "- lga_profile", "is not YAML"),
        ("fingerprint:", "finger:", "fingerprint: Field required"),
        ("kind: cpu", "kind: tpu", "device.kind: Input should be 'cpu' or 'cuda'"),
        ("micro_batch_size: 4", "micro_batch_size: 1", "has micro-batch sizes [1, 1]"),
        ("micro_batch_size: 1", "micro_batch_size: 0", "has micro-batch sizes [0, 4]"),
        ("micro_batch_size: 1", "micro_batch_size: one", "micro_batch_size: Input should be"),
        ("num_cores: 2", "num_cores: 0", "has device.num_cores 0"),
        ("num_threads: 1", "num_threads: -1", "has device.num_threads -1"),
        ("num_repeats: 1", "num_repeats: 0", "has num_repeats 0"),
        ("complete: true", "", "has been cut short"),
        ("complete: true", "complete: 1", "has been cut short"),
        ("layers: [two, three]", "layers: [two, two]", "names a layer twice"),
        ("layers: [two, three]", "layers: [two, four]", "has other layers at micro-batch size 4"),
        ("layers: [two, three]", "layers: []", "with the profile of 'two'"),
        ("layers: [two, three]", "layers: [three, two]", "with the profile of 'two'"),
        ("forward_seconds: 0.001\n", "forward_seconds: 0.002\n", "is not the median"),
        ("forward_seconds: 0.001\n", "forward_seconds: null\n", "is not the median"),
        ("optimizer_bytes: 24", "optimizer_bytes: -1", "with optimizer_bytes -1, less than 0"),
        ("spread: 0.000125", "spread: -1.0", "not finite and 0 or more"),
        ("spread: 0.000125", "spread: .nan", "not finite and 0 or more"),
        ("num_repeats: 1", "num_repeats: !!python/name:os.system ''", "is not YAML of plain data"),
        ("num_repeats: 1", "num_repeats: 2026-01-01", "does not validate"),
        ("num_repeats: 1", "num_repeats: 1\nmore: 2", "more: Unexpected keyword argument"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, words: str) -> None:
    text = print_profile(measured_model())
    assert old in text
    with pytest.raises(UsageError) as caught:
        parse_profile(text.replace(old, new, 1), source="some.yaml")
    assert caught.value.message.startswith("some.yaml ")
    assert words in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_no_cut_of_a_profile_is_accepted() -> None:
    text = print_profile(measured_model())
    lines = text.splitlines(keepends=True)
    for end in (*range(0, len(lines), 40), len(lines) - 1):
        with pytest.raises(UsageError):
            parse_profile("".join(lines[:end]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nlga_profile: 2\n", "has an alias (*a)"),
        ("a: &a [*a]\nlga_profile: 2\n", "has an alias (*a)"),
        ("lga_profile: 2\na: " + "[" * 100_000, "deep"),
        ("lga_profile: 2\na:\n  " + "- " * 100_000, "deep"),
    ],
)
def test_small_files_that_would_fill_memory(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_profile(text, source="a.yaml")
    assert words in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    for name, words in (
        ("absent.yaml", "there is no profile file"),
        ("binary.yaml", "cannot be read"),
        ("deep.yaml", "more than 50 deep"),
        (".", "cannot be read"),
        ("pipe.yaml", "is no regular file"),
    ):
        with pytest.raises(UsageError, match=words):
            read_profile(tmp_path / name)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_profile(measured_model(), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
