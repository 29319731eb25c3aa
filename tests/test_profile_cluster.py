"""A cluster measured by real processes, and the file that says what was found."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from click.testing import CliRunner

from planner.cli.plan import main as plan_main
from planner.cluster import resolve_cluster
from planner.cluster.files import validate
from planner.cluster.fit import fit_affine
from planner.cluster.schema import ClusterFile, DeviceSpec, LinkSpec

ROOT = Path(__file__).resolve().parent.parent
PROFILE = [sys.executable, "-c", "from planner.cli.profile import main; main()", "--cluster"]
MODULE = [sys.executable, "-m", "runtime.profile_cluster"]
SMALL = ["--device", "cpu", "--largest", "64KiB"]


def run(command: list[str], folder: Path, **other: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **other}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def check_file(path: Path, num_ranks: int, num_hosts: int) -> dict[str, object]:
    """What every measured file holds."""
    text = path.read_text()
    file = validate(ClusterFile, text, path.name)
    assert sum(h.count for h in file.hosts) == num_ranks
    assert len(file.hosts) == num_hosts
    assert file.backend == "gloo"
    assert file.measured is not None
    assert "runtime.profile_cluster" in file.measured.command
    assert set(file.measured.versions) == {"torch", "python"}
    for entry in file.hosts:
        assert isinstance(entry.device, DeviceSpec)
        assert all(figure.source for figure in entry.device.peak_flops.values())
        assert entry.device.memory_bandwidth.source
        assert entry.device.synchronous
    cluster = resolve_cluster(str(path), num_ranks)
    assert cluster.num_devices == num_ranks
    assert [path.name] == [p.name for p in path.parent.iterdir()]  # nothing half-written beside
    loaded: dict[str, object] = yaml.safe_load(text)
    return loaded


def test_two_processes_measure_a_cluster_that_plans(tmp_path: Path) -> None:
    result = run([*PROFILE, "--gpus", "2", "--output", "c.yaml", *SMALL], tmp_path)
    assert result.returncode == 0, result.stderr
    check_file(tmp_path / "c.yaml", 2, 1)
    file = validate(ClusterFile, (tmp_path / "c.yaml").read_text(), "c.yaml")
    assert file.measured is not None
    samples = {(s.operation, s.bytes): s for s in file.measured.samples}
    for operation in ("gather", "reduce-scatter", "all-reduce", "send"):
        assert samples[operation, 2**16].seconds > 0
        assert samples[operation, 2**16].ranks == 2
    assert ("exchange", 2**16) in samples
    assert {o.operation for o in file.measured.overlaps} == {"exchange", "gather", "reduce-scatter"}
    link = file.hosts[0].link
    assert isinstance(link, LinkSpec)
    # The link's law goes through its own samples, as nearly as the file says.
    sends = {size: s.seconds for (operation, size), s in samples.items() if operation == "send"}
    law = fit_affine(sends, {size: samples["send", size].spread for size in sends})
    assert link.latency_seconds.value == pytest.approx(law.latency_seconds, rel=1e-3)
    assert link.bandwidth.value == pytest.approx(law.bandwidth, rel=1e-3)
    assert f"within {law.residual:.1%}" in link.bandwidth.source
    for words in ("transfers and collectives", "beside a computation", "measured link", "c.yaml"):
        assert words in result.stdout

    output = tmp_path / "p.yaml"
    model = str(ROOT / "examples" / "mlp.py")
    words = [model, "--gpus", "2", "--cluster", str(tmp_path / "c.yaml"), "--output", str(output)]
    planned = CliRunner().invoke(plan_main, words)
    assert planned.exit_code == 0, planned.output
    assert "measured on" in planned.output
    assert output.exists()


@pytest.mark.slow
def test_one_process_measures_its_device_only(tmp_path: Path) -> None:
    result = run([*MODULE, "--gpus=1", "--output", "one.yaml", *SMALL], tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = check_file(tmp_path / "one.yaml", 1, 1)
    assert loaded["network"] == "loopback"
    assert "not measured" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "not started by a launcher"),
        (["--gpus", "2", "--output", "no/such/c.yaml"], "there is no folder"),
        (["--gpus", "2", "--largest", "100"], "only latency"),
        (["--gpus", "4096", "--device", "cuda"], "torch finds"),
    ],
)
def test_wrong_options_start_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.profile_cluster import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ended: list[int] = []

    def end(code: int) -> None:  # a rank ends its process; this one goes on
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


class Ranks:
    """Processes that some launcher started, and their rendezvous."""

    def __init__(self, folder: Path, words: list[list[str]], num_ranks: int = 0) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(num_ranks or len(words)),
            "LOCAL_RANK": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = [
            subprocess.Popen(
                [*MODULE, "--device", "cpu", *more],
                cwd=folder,
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, more in enumerate(words)
        ]

    def end(self) -> list[tuple[int, str]]:
        """Exit code and last words of each."""
        try:
            words = [process.communicate(timeout=250)[1] for process in self.processes]
            return [(p.returncode, w) for p, w in zip(self.processes, words, strict=True)]
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_hosts_are_told_apart_by_name(tmp_path: Path) -> None:
    names = ["left", "left", "right", "right"]
    words = [["--output", "four.yaml", "--largest", "64KiB", "--host-name", n] for n in names]
    assert [code for code, _ in Ranks(tmp_path, words).end()] == [0, 0, 0, 0]
    check_file(tmp_path / "four.yaml", 4, 2)
    file = validate(ClusterFile, (tmp_path / "four.yaml").read_text(), "four.yaml")
    assert isinstance(file.network, LinkSpec)
    assert file.measured is not None
    found = {(s.operation, s.where, s.ranks) for s in file.measured.samples}
    assert ("gather", "inside", 2) in found
    assert ("gather", "between", 4) in found
    assert ("crowd", "between", 4) in found


@pytest.mark.slow
def test_mixed_up_hosts_are_refused(tmp_path: Path) -> None:
    words = [["--output", "mixed.yaml", "--host-name", n] for n in ("left", "right", "left")]
    ended = Ranks(tmp_path, words).end()
    assert [code for code, _ in ended] == [2, 2, 2]
    assert any("left, right, left" in said for _, said in ended)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_measurement(tmp_path: Path) -> None:
    words = [["--output", "c.yaml", "--largest", "256MiB", "--deadline", "30"]] * 2
    ranks = Ranks(tmp_path, words)
    progress = ranks.processes[0].stderr
    assert progress is not None
    assert "messages" in progress.readline()  # all have joined, and it takes a while
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    (code, said), _ = ranks.end()
    assert code == 1
    assert "rank 1" in said
    assert "died" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_that_never_come_are_not_waited_for(tmp_path: Path) -> None:
    words = [["--output", "c.yaml", "--deadline", "3"]]
    ((code, said),) = Ranks(tmp_path, words, num_ranks=2).end()
    assert code == 1
    assert "could not join the other 1 within 3 s" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_four_processes_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    words = ["-m", "runtime.profile_cluster", "--output", "four.yaml", *SMALL]
    result = run([*torchrun, *words], tmp_path)
    assert result.returncode == 0, result.stderr
    check_file(tmp_path / "four.yaml", 4, 1)
    assert "crowd" in (tmp_path / "four.yaml").read_text()
