"""Training in a process group that is there already: one's own, or Lightning Fabric's."""

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from planned import plan_of
from stepping import batches, linears
from training import EXAMPLES, even_plan

import runtime
from planner.errors import UsageError
from planner.plan.file import write_plan
from planner.plan.types import Plan, PlanOptions
from runtime.transfer import initialise

HERE = Path(__file__).parent


def torchrun(folder: Path, *words: str) -> str:
    """What two ranks print."""
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *words],
        cwd=folder,
        env=os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def small_plan(num_pipeline_ranks: int = 1) -> Plan:
    options = PlanOptions(deadline_seconds=60)
    return plan_of(linears(), (0, 2, 5), num_pipeline_ranks=num_pipeline_ranks, options=options)


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    meeting = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_that_have_joined_train_the_same_bits(tmp_path: Path) -> None:
    write_plan(small_plan(num_pipeline_ranks=2), tmp_path / "a.plan.yaml")
    losses = {}
    for how in ("connect", "env", str(tmp_path / "meeting")):
        script = str(HERE / "joined_ranks.py")
        torchrun(tmp_path, script, how, "a.plan.yaml", "losses")
        losses[how] = [torch.load(tmp_path / f"losses.{rank}") for rank in range(2)]
    first, *others = losses.values()
    assert first[0][:2] == first[0][2:] == first[1][:2]
    assert first[0][0] != first[0][1]
    assert all(other == first for other in others)


@pytest.mark.usefixtures("joined")
def test_one_rank_that_has_joined_trains_the_same_bits() -> None:
    plan, model_file = small_plan(), linears()
    losses = []
    for _ in range(2):
        with runtime.connect(plan, model_file.build_model, loss_fn=model_file.loss_fn) as executor:
            losses.append(executor.step(batches(plan, model_file, 0)[0]).loss)
        assert dist.is_initialized()
    dist.destroy_process_group()
    with runtime.connect(plan, model_file.build_model, loss_fn=model_file.loss_fn) as executor:
        assert losses == [executor.step(batches(plan, model_file, 0)[0]).loss] * 2
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("joined")
def test_a_group_of_another_size_is_refused() -> None:
    with (
        pytest.raises(UsageError, match="started 1 processes, but the plan needs 2"),
        runtime.connect(small_plan(2), linears().build_model),
    ):
        pass
    assert dist.is_initialized()


@pytest.mark.usefixtures("joined")
def test_another_rank_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(UsageError, match=r"is rank 0 of the process group .* launched as rank 1"),
        runtime.connect(small_plan(), linears().build_model),
    ):
        pass


@pytest.mark.usefixtures("joined")
def test_a_group_of_another_backend_is_refused() -> None:
    plan = small_plan()
    plan = replace(plan, cluster=replace(plan.cluster, backend="nccl"))
    with pytest.raises(UsageError, match=r"has the backends cpu:gloo.* the plan is for 'nccl'"):
        initialise(plan)


@pytest.mark.skipif(
    importlib.util.find_spec("lightning_fabric") is None,
    reason="lightning-fabric is not installed: pip install -e '.[dev]'",
)
def test_inside_lightning_fabric(tmp_path: Path) -> None:
    made = even_plan(
        "planned_training",
        num_pipeline_ranks=2,
        stages_per_rank=2,
        num_micro_batches=4,
        micro_batch_size=4,
    )
    write_plan(made, tmp_path / "plan.yaml")
    plain = torchrun(tmp_path, str(EXAMPLES / "planned_training.py"))
    assert "step 9 loss 4." in plain
    assert torchrun(tmp_path, str(EXAMPLES / "fabric_training.py")) == plain
    assert torch.load(tmp_path / "settings.pt")["num_steps"] == 10
    assert (tmp_path / "checkpoint").is_dir()
    (metrics,) = tmp_path.glob("logs/**/metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    printed = [f"step {row['step']} loss {float(row['loss']):.9f}" for row in rows]
    assert printed == plain.splitlines()
