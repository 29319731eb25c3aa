"""Checkpoints: written by the ranks of one plan, taken up by those of another, bit for bit."""

import functools
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import model_of, plan_of
from stepping import CPU, batches, on_every_rank, whole_state
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR, StepLR

from planner.errors import FingerprintError, UsageError
from planner.model_file import ModelFile
from planner.plan.types import Plan
from runtime.build import build_model
from runtime.checkpoint import read_info
from runtime.checkpoint.parts import Part
from runtime.executor import Executor

State = dict[str, Tensor]
HALF = 2
"""Steps before the checkpoint, and as many after it."""


class Layer(nn.Module):
    """Widths that no number of replicas divides, running statistics, dropout, a lone number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.dropout(self.norm(self.linear(x))) * self.scale
        return output


class Odd(nn.Module):
    """A tied head, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.head.weight = self.first.weight
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.head(x)[:, :4]
        return output


def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """No decay on what has one dimension or none; rates of their own."""
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in given if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-2},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)


def warm_up(optimizer: torch.optim.Optimizer) -> SequentialLR:
    parts = [LinearLR(optimizer, 0.1, total_iters=3), StepLR(optimizer, 1, 0.5)]
    return SequentialLR(optimizer, parts, milestones=[3])


SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"build_optimizer": two_groups, "build_scheduler": warm_up},
    "SGD": {
        "build_optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "build_scheduler": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    },
    "NAdam": {"build_optimizer": lambda p: torch.optim.NAdam(p, lr=1e-2)},
}


@functools.cache
def odd(optimizer: str = "AdamW") -> ModelFile:
    return replace(model_of(Odd), **SETTINGS[optimizer])


@functools.cache
def made(layout: str, optimizer: str = "AdamW") -> Plan:
    """Plans of the same work: six samples of two in a step."""
    model_file = odd(optimizer)
    layouts: dict[str, dict[str, Any]] = {
        "one process": {"boundaries": (0, 5)},
        "one process, offloaded": {"boundaries": (0, 2, 5), "offload_state": True},
        "two ranks, tied on one": {
            "boundaries": (0, 1, 3, 5), "num_pipeline_ranks": 2, "recompute": True,
        },
        "three stages, two ranks": {
            "boundaries": (0, 2, 4, 5), "num_pipeline_ranks": 2, "stage_ranks": (0, 1, 0),
        },
        "replicas, partition 0": {"boundaries": (0, 3, 5), "num_replicas": 2, "partition": 0},
        "replicas, partition 1": {"boundaries": (0, 5), "num_replicas": 2, "partition": 1},
        "replicas, partition 2": {
            "boundaries": (0, 1, 5), "num_replicas": 2, "partition": 2, "offload_state": True,
        },
        "replicas, partition 3": {
            "boundaries": (0, 1, 3, 5), "num_replicas": 2, "num_pipeline_ranks": 2,
        },
        "replicas, partition 3, offloaded": {
            "boundaries": (0, 1, 4, 5), "num_replicas": 2, "offload_state": True,
        },
    }  # fmt: skip
    return plan_of(model_file, **layouts[layout])


@functools.cache
def given(step: int, num_replicas: int) -> list[dict[str, Tensor]]:
    """The same for all plans of so many replicas; drawn before the ranks' threads start."""
    plan = made("replicas, partition 0" if num_replicas > 1 else "one process")
    return batches(plan, odd(), step)


def drawn(layout: str, optimizer: str) -> Plan:
    """The plan, with the batches of all steps drawn."""
    plan = made(layout, optimizer)
    for step in range(2 * HALF):
        given(step, plan.num_replicas)
    return plan


def train(executor: Executor, first: int, last: int) -> None:
    for step in range(first, last):
        executor.step(given(step, executor.plan.num_replicas)[executor.replica])


@functools.cache
def uninterrupted(layout: str, optimizer: str) -> list[State]:
    """The states of all ranks after both halves."""
    plan, model_file = drawn(layout, optimizer), odd(optimizer)

    def run(executor: Executor) -> State:
        train(executor, 0, 2 * HALF)
        return executor.state_dict()

    return on_every_rank(plan, model_file, run)


def saved(layout: str, folder: Path, optimizer: str = "AdamW") -> list[State]:
    """Train the first half and save; the states of all ranks."""
    plan, model_file = drawn(layout, optimizer), odd(optimizer)

    def run(executor: Executor) -> State:
        train(executor, 0, HALF)
        executor.save(folder, {"sample": 12})
        return executor.state_dict()

    return on_every_rank(plan, model_file, run)


def resumed(layout: str, folder: Path, optimizer: str = "AdamW") -> list[State]:
    """Take it up with other weights at first, and train the second half."""
    plan, model_file = made(layout, optimizer), odd(optimizer)
    other = replace(model_file, build_model=lambda: zeroed(model_file.build_model()))

    def run(executor: Executor) -> State:
        info = executor.load(folder)
        assert info.num_steps == executor.num_steps == HALF
        assert info.data == {"sample": 12}
        train(executor, HALF, 2 * HALF)
        return executor.state_dict()

    return on_every_rank(plan, other, run)


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def assert_equal(mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert mine.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(mine[name], value)] == []


@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        ("one process", "two ranks, tied on one", "AdamW"),
        ("two ranks, tied on one", "one process, offloaded", "AdamW"),
        ("one process, offloaded", "one process", "NAdam"),
        ("two ranks, tied on one", "one process", "SGD"),
    ],
)
def test_another_plan_goes_on_bit_for_bit(
    tmp_path: Path, first: str, second: str, optimizer: str
) -> None:
    saved(first, tmp_path / "half", optimizer)
    mine = whole_state(made(second, optimizer), resumed(second, tmp_path / "half", optimizer))
    assert_equal(mine, whole_state(made(first), uninterrupted(first, optimizer)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("replicas, partition 3", "replicas, partition 0"),
        ("replicas, partition 1", "replicas, partition 3, offloaded"),
        ("replicas, partition 3, offloaded", "replicas, partition 2"),
        ("replicas, partition 2", "replicas, partition 1"),
    ],
)
def test_parameters_are_the_same_in_every_layout(tmp_path: Path, first: str, second: str) -> None:
    model_file, plan = odd("SGD"), drawn(second, "SGD")
    before = whole_state(made(first, "SGD"), saved(first, tmp_path / "half", "SGD"))
    info = read_info(tmp_path / "half")
    assert (info.num_steps, info.seed, info.global_batch_size) == (HALF, 0, 12)

    def run(executor: Executor) -> tuple[State, State]:
        executor.load(tmp_path / "half")
        loaded = executor.state_dict()
        train(executor, HALF, 2 * HALF)
        return loaded, executor.state_dict()

    found = on_every_rank(plan, model_file, run)
    for replica in range(2):
        assert_equal(whole_state(plan, [loaded for loaded, _ in found], replica), before)
    mine = whole_state(plan, [state for _, state in found])
    wanted = whole_state(made(first, "SGD"), uninterrupted(first, "SGD"))
    for name, value in wanted.items():
        if "running" not in name:  # each replica goes on from the statistics of replica 0
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)


def test_torch_reads_it_into_a_plain_model_and_optimizer(tmp_path: Path) -> None:
    layout = "replicas, partition 3"
    before = whole_state(made(layout), saved(layout, tmp_path / "half"))
    dcp_to_torch_save(tmp_path / "half", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    plain = build_model(odd(), 0, CPU)
    plain.load_state_dict(whole["model"])  # every name is there, those of tied weights too
    assert_equal({name: plain.state_dict()[name] for name in before}, before)
    slots = whole["optimizer"]["state"]["first.weight"]
    assert slots["exp_avg"].shape == (8, 8)
    assert slots["step"].item() == HALF
    assert whole["optimizer"]["state"]["layers.0.scale"]["exp_avg"].shape == ()


def test_whole_tensors_go_in() -> None:
    whole = build_model(odd(), 5, CPU).state_dict()
    for layout in ("replicas, partition 3, offloaded", "replicas, partition 2", "one process"):

        def run(executor: Executor) -> State:
            executor.load_state_dict(whole)
            return executor.state_dict()

        for state in on_every_rank(made(layout), odd(), run):
            assert_equal(state, {name: whole[name] for name in state})


def test_a_state_that_lacks_something_changes_nothing() -> None:
    whole = dict(build_model(odd(), 5, CPU).state_dict())
    whole["layers.1.linear.weight"] = whole["layers.1.linear.weight"][:4]

    def run(executor: Executor) -> tuple[State, State, str]:
        before = executor.state_dict()
        with pytest.raises(UsageError) as caught:
            executor.load_state_dict(whole)
        return before, executor.state_dict(), str(caught.value)

    ((before, after, message),) = on_every_rank(made("one process"), odd(), run)
    assert_equal(after, before)
    assert "has shape (4, 8) for layers.1.linear.weight" in message


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("one process", tmp_path / "runs" / "step-2")
    whole = {file.name for file in (tmp_path / "runs" / "step-2").iterdir()}
    assert {".metadata", "training.pt"} < whole

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.checkpoint.write.FileSystemWriter.finish", fail)
    with pytest.raises(UsageError, match=r"cannot write .*step-4: No space left"):
        saved("one process", tmp_path / "runs" / "step-4")
    with pytest.raises(UsageError, match="there is nothing"):
        read_info(tmp_path / "runs" / "step-4")
    with pytest.raises(UsageError, match="is no whole checkpoint"):
        read_info(tmp_path / "runs" / ".step-4.partial")
    assert read_info(tmp_path / "runs").path.name == "step-2"  # the last whole one


def test_what_is_no_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is there already, and is no checkpoint"):
        saved("one process", folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="no whole checkpoint"):
        read_info(folder)
    with pytest.raises(UsageError, match="there is nothing"):
        read_info(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    saved("one process", tmp_path / "half")
    (data,) = (tmp_path / "half").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-2000])
    with pytest.raises(UsageError, match="is no whole checkpoint"):
        resumed("one process", tmp_path / "half")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code has run')",))


@pytest.mark.parametrize("file", [".metadata", "training.pt"])
def test_reading_runs_no_code(tmp_path: Path, file: str) -> None:
    saved("one process", tmp_path / "half")
    (tmp_path / "half" / file).write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(UsageError, match="is no whole checkpoint"):
        resumed("one process", tmp_path / "half")


def test_another_model_or_seed_is_refused(tmp_path: Path) -> None:
    saved("one process", tmp_path / "half")
    plan = made("one process")
    of_other_seed = replace(plan, options=replace(plan.options, seed=3))
    for other, kind in ((replace(plan, fingerprint="0" * 32), FingerprintError),
                        (of_other_seed, UsageError)):  # fmt: skip
        with pytest.raises(kind):
            on_every_rank(other, odd(), lambda executor: executor.load(tmp_path / "half"))


def test_a_checkpoint_is_replaced_by_the_next(tmp_path: Path) -> None:
    saved("one process", tmp_path / "last")

    def run(executor: Executor) -> None:
        train(executor, 0, 1)
        executor.save(tmp_path / "last")

    on_every_rank(made("one process"), odd(), run)
    assert read_info(tmp_path / "last").num_steps == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (3, 1, 2), (1, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_boxes_hold_a_range_once(shape: tuple[int, ...], reverse: bool) -> None:
    order = tuple(reversed(range(len(shape)))) if reverse else tuple(range(len(shape)))
    laid = torch.empty([shape[dim] for dim in order]).permute(order)  # dense, in that order
    whole = torch.arange(laid.numel()).float()
    for first in range(whole.numel()):
        for last in range(first + 1, whole.numel() + 1):
            part = Part(
                key=("x",),
                shape=shape,
                stride=laid.stride(),
                first=first,
                values=whole[first:last].clone(),
            )
            found = torch.full(shape, -1.0)
            for box in part.boxes():
                place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                assert (found[place] == -1).all()
                found[place] = box.values
            wanted = torch.full((whole.numel(),), -1.0)
            wanted[first:last] = whole[first:last]
            assert torch.equal(found, wanted.as_strided(shape, laid.stride()))
