"""Both transports move and add the same bits, for every size and layout, and say what failed."""

import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import minimal_plan
from torch import Tensor
from transport_ranks import KINDS, SCENARIOS, SIZES, every_call, many_at_once, values

from planner.errors import DeadlineError, PeerLostError
from planner.layouts import Grid, Layout
from planner.plan.types import Plan
from runtime.exchange import Channel
from runtime.local import LocalHub, LocalTransport, run_local

LAYOUTS = [
    minimal_plan(1, 1),
    minimal_plan(1, 2),
    minimal_plan(2, 1, tied=[(0, 1)]),
    minimal_plan(1, 4),
    minimal_plan(4, 1, tied=[(0, 1, 3), (0, 2)]),
    minimal_plan(2, 2, tied=[(0, 1)], layout=Layout.PIPELINE_INSIDE),
    minimal_plan(1, 4, partition=2, partition_group_size=2),
]
RING = Grid(num_replicas=1, num_pipeline_ranks=2)
UNEVEN = [minimal_plan(3, 2, tied=[(0, 2)], layout=layout) for layout in Layout]
GROUPED = [
    minimal_plan(ranks, replicas, layout=layout, partition=2, partition_group_size=size)
    for layout in Layout
    for ranks, replicas, size in ((2, 6, 3), (1, 6, 2), (1, 3, 1), (1, 1, 1))
]


def name_of(plan: Plan) -> str:
    grouped = f" by {size}" if (size := plan.partition_group_size) else ""
    return f"{plan.num_pipeline_ranks}x{plan.num_replicas} {plan.layout}{grouped}"


class Job:
    """Real processes, one per rank, that run a scenario over gloo."""

    def __init__(
        self,
        scenario: str,
        given: Plan | list[Plan],
        folder: Path,
        *,
        num_processes: int = 0,
        script: str = "transport_ranks.py",
    ) -> None:
        if isinstance(given, Plan):
            num_processes = num_processes or given.world_size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "plan").write_bytes(pickle.dumps(given))
        self._output = folder / "output"
        script = str(Path(__file__).parent / script)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", script, scenario, folder / "plan", self._output],
                env=os.environ
                | {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._store.port),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(num_processes),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "OMP_NUM_THREADS": "1",
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_processes)
        ]

    def end(self, ranks: list[int] | None = None) -> list[str]:
        """Wait for these ranks (all); returns what each wrote to stderr."""
        ranks = list(range(len(self.processes))) if ranks is None else ranks
        try:
            return [self.processes[rank].communicate(timeout=60)[1] for rank in ranks]
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()

    def end_store_after(self, *keys: str) -> None:
        """End the job's store, as the death of its owner would, once it has these keys."""
        self._store.wait(list(keys))
        del self._store

    def results(self) -> list[dict[str, Tensor]]:
        errors = self.end()
        assert [p.returncode for p in self.processes] == [0] * len(errors), errors
        assert errors == [""] * len(errors)
        return [torch.load(f"{self._output}.{rank}") for rank in range(len(errors))]


def expected_every_call(plan: Plan, world_rank: int) -> dict[str, Tensor]:
    """By plain indexing and addition in order of ranks."""
    pipeline_rank, replica = plan.coordinates(world_rank)
    replicas = [plan.world_rank(pipeline_rank, r) for r in range(plan.num_replicas)]
    found: dict[str, Tensor] = {}
    traffic = torch.zeros(len(KINDS), dtype=torch.int64)
    others, parts = plan.num_replicas - 1, plan.partition_group_size or plan.num_replicas
    groups = [replicas[first : first + parts] for first in range(0, len(replicas), parts)]
    group, place = divmod(replica, parts)
    for size in SIZES:
        found[f"gather {size}"] = torch.cat([values(r, size) for r in groups[group]])
        sums = [in_order([values(r, size * parts) for r in members]) for members in groups]
        whole = in_order(sums)
        found[f"reduce_scatter {size}"] = whole[place * size : (place + 1) * size]
        traffic[1:3] += 4 * size * (parts - 1)
        if len(groups) > 1:
            mine = size // len(groups) + (group < size % len(groups))
            traffic[2] += 4 * (size - mine + mine * (len(groups) - 1))
        for dtype in (torch.float32, torch.bfloat16) if plan.partition < 2 else ():
            summed = in_order([values(r, size, dtype) for r in replicas])
            found[f"all_reduce {size} {dtype}"] = summed
            mine = size // plan.num_replicas + (replica < size % plan.num_replicas)
            if others:
                traffic[2] += (size - mine + mine * others) * dtype.itemsize
        for unit in plan.units:
            if pipeline_rank in unit.ranks:
                sharers = [plan.world_rank(p, replica) for p in unit.ranks]
                found[f"tied {unit.ranks} {size}"] = in_order([values(r, size) for r in sharers])
                traffic[3] += 4 * size * (len(unit.ranks) - 1)
        world = [values(rank, size).double() for rank in range(plan.world_size)]
        found[f"world {size}"] = in_order(world)
        traffic[4] += 8 * size * (plan.world_size - 1)
        if plan.num_pipeline_ranks > 1:
            previous = (pipeline_rank - 1) % plan.num_pipeline_ranks
            found[f"ring {size}"] = values(plan.world_rank(previous, replica), size)
            traffic[0] += 4 * size
    return found | {"traffic": traffic}


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for rank, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == wanted.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, wanted[key]), (rank, key)


@pytest.mark.parametrize("plan", [*LAYOUTS, *UNEVEN, *GROUPED], ids=name_of)
def test_every_call_between_threads(plan: Plan) -> None:
    found = run_local(plan, lambda transport, rank: every_call(transport, rank, plan))
    assert_equal(found, [expected_every_call(plan, rank) for rank in range(plan.world_size)])


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan, marks=[pytest.mark.slow] if plan in LAYOUTS[1:4] else [])
        for plan in LAYOUTS
    ],
    ids=name_of,
)
def test_every_call_between_processes(plan: Plan, tmp_path: Path) -> None:
    found = Job("every_call", plan, tmp_path).results()
    assert_equal(found, [expected_every_call(plan, rank) for rank in range(plan.world_size)])


def test_the_values_tell_orders_apart() -> None:
    parts = [values(rank, 64) for rank in range(4)]
    assert not torch.equal(in_order(parts), in_order(parts[::-1]))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_many_messages_in_flight(num_replicas: int, tmp_path: Path) -> None:
    plan = minimal_plan(2, num_replicas)
    threads = run_local(plan, lambda transport, rank: many_at_once(transport, rank, plan))
    assert_equal(Job("many_at_once", plan, tmp_path).results(), threads)
    for rank, found in enumerate(threads):
        pipeline_rank, replica = plan.coordinates(rank)
        sender = plan.world_rank(1 - pipeline_rank, replica)
        for i in range(12):
            assert torch.equal(found[f"message {i}"], values(sender, 20_000 + i))


def test_deadline_between_threads() -> None:
    plan = minimal_plan(2, 1, deadline_seconds=0.5)
    with pytest.raises(DeadlineError) as caught:
        run_local(plan, lambda transport, rank: SCENARIOS["silent_peer"](transport, rank, plan))
    for words in ("rank 0 (pipeline rank 0", "input h.3 of micro-batch 2", "rank 1 ", "0.5 s"):
        assert words in caught.value.message


def test_deadline_between_processes(tmp_path: Path) -> None:
    plan = minimal_plan(2, 1, deadline_seconds=2, heartbeat_seconds=1)
    job = Job("silent_peer", plan, tmp_path)
    errors = job.end()
    assert [process.returncode for process in job.processes] == [1, 1]
    for words in ("rank 0 (pipeline rank 0", "input h.3 of micro-batch 2", "rank 1 ", " 2 s"):
        assert words in errors[0]
    assert "deadline" in errors[0]
    assert "error: rank 0 (pipeline rank 0" in errors[1]
    assert "; rank 1 (pipeline rank 1, replica 0) ends with it" in errors[1]


def test_the_first_error_of_a_thread_is_raised() -> None:
    plan = minimal_plan(4, 1)

    def function(transport: LocalTransport, rank: int) -> None:
        if rank == 2:
            raise ValueError("the loss is a teapot")
        transport.receive(2, torch.empty(1), "what never comes").wait()

    with pytest.raises(ValueError, match="teapot"):
        run_local(plan, function)


def test_abort_wakes_a_waiting_thread() -> None:
    hub = LocalHub(RING, deadline_seconds=60)
    pending = LocalTransport(hub, 0).receive(1, torch.empty(1), "a message")
    threading.Timer(0.1, hub.abort, [ValueError("teapot")]).start()
    with pytest.raises(PeerLostError, match="teapot"):
        pending.wait()


def test_a_local_message_of_another_size_is_refused() -> None:
    hub = LocalHub(RING, deadline_seconds=1)
    LocalTransport(hub, 0).send(1, torch.empty(3), "three")
    with pytest.raises(AssertionError, match="three sends 3 elements, not 4"):
        LocalTransport(hub, 1).receive(0, torch.empty(4), "four")


def test_another_world_size_is_refused(tmp_path: Path) -> None:
    job = Job("every_call", minimal_plan(4, 1), tmp_path, num_processes=2)
    for words in job.end():
        assert "the launcher started 2 processes, but the plan needs 4" in words
        assert "Traceback" not in words
    assert [process.returncode for process in job.processes] == [2, 2]


class Nothing:
    """A job that can be watched."""

    def __call__(self) -> None:
        pass


def test_a_job_is_let_go_before_anybody_hears_that_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else what it received might still be there when its rank makes more."""
    held: list[bool] = []

    class Heard(Future[None]):
        def set_result(self, result: None) -> None:
            held.append(watched() is not None)
            super().set_result(result)

    monkeypatch.setattr("runtime.worker.Future", Heard)
    transport = LocalTransport(LocalHub(Grid(num_replicas=1, num_pipeline_ranks=1), 10), 0)
    job = Nothing()
    watched = weakref.ref(job)
    pending = transport._run(Channel("reduce", (0,)), job)
    del job
    pending.wait()
    transport.close()
    assert held == [False]
