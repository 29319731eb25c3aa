"""What a plan offloads may be in files of a folder: the same bits, and no file left behind."""

import resource
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from stepping import batches, on_every_rank
from test_resume import lga_run
from training import EXAMPLES, even_plan, example

from planner.errors import RunError, UsageError
from planner.plan.file import write_plan
from planner.plan.types import Plan
from runtime.build import make_executor
from runtime.executor import Executor
from runtime.launch import main
from runtime.local import LocalTransport, run_local
from runtime.mapped import LEAST_BYTES, MappedFolder

GPT = str(EXAMPLES / "gpt.py")


def offloading(num_replicas: int = 1) -> Plan:
    return even_plan(
        "gpt",
        num_replicas=num_replicas,
        stages_per_rank=3,
        num_micro_batches=2,
        partition=3 if num_replicas > 1 else 0,
        recompute=True,
        offload_state=True,
        offload_inputs=True,
    )


def num_mapped(folder: Path) -> int:
    """Files of a folder that this process has mapped."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"{folder}/lga-")


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_run_with_files_is_the_same_to_the_last_bit(tmp_path: Path, num_replicas: int) -> None:
    write_plan(offloading(num_replicas), tmp_path / "it.plan.yaml")
    states = []
    for words in ((), ("--offload-folder", "there/deep")):
        found = lga_run(tmp_path, "it.plan.yaml", GPT, "--steps", "3", "--save", "it.pt", *words)
        assert found.returncode == 0, found.stderr
        states.append(torch.load(tmp_path / "it.pt", weights_only=True))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not list((tmp_path / "there" / "deep").iterdir())


def test_what_is_offloaded_is_in_the_files(tmp_path: Path) -> None:
    plan, (model_file, _) = offloading(), example("gpt")
    given = batches(plan, model_file, 0)

    def step(executor: Executor) -> int:
        executor.step(given[0])
        return num_mapped(tmp_path)

    def with_files(transport: LocalTransport, world_rank: int) -> int:
        device = torch.device("cpu")
        return step(make_executor(plan, model_file, transport, world_rank, device, tmp_path))

    assert run_local(plan, with_files)[0] > 10
    assert on_every_rank(plan, model_file, step) == [0]
    assert not list(tmp_path.iterdir())


def test_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    files, size = MappedFolder(tmp_path), LEAST_BYTES // 4
    small = files.empty_strided((size - 1,), (1,), torch.float32)
    assert num_mapped(tmp_path) == 0
    large = files.empty_strided((2, size // 2), (1, 2), torch.float32)
    assert num_mapped(tmp_path) == 1
    assert (large.shape, large.stride(), small.numel()) == ((2, size // 2), (1, 2), size - 1)
    large.fill_(3.0)
    assert large.sum() == 3.0 * size
    del large
    assert num_mapped(tmp_path) == 0


def test_a_disk_without_room_is_an_error(tmp_path: Path) -> None:
    files, (soft, hard) = MappedFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LEAST_BYTES, hard))
    try:
        with pytest.raises(RunError, match="no room for 131072 bytes in --offload-folder"):
            files.empty_strided((2 * LEAST_BYTES,), (1,), torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(UsageError, match="no file can be made in --offload-folder"):
        MappedFolder(tmp_path / "taken" / "inside")


def test_a_plan_that_offloads_nothing_has_no_use_for_it(tmp_path: Path) -> None:
    write_plan(even_plan("gpt"), tmp_path / "it.plan.yaml")
    words = [str(tmp_path / "it.plan.yaml"), GPT, "--offload-folder", str(tmp_path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "--offload-folder is given, and the plan offloads nothing" in result.stderr
