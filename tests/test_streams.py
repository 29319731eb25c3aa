"""On a GPU nothing waits that need not, and nothing starts too early: the order that is issued.

Streams are stood in for by `races`, which does the work on the CPU and finds what is not ordered.
What needs a GPU is in test_cuda.py.
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import test_host_updates as updates
import torch
from planned import Chain, assert_same, model_of, plan_of
from races import Device, Event, HostJob, Races, Stream
from stepping import CPU, LAYOUTS, batches, linears, on_every_rank
from test_runtime_offload import Twice, Wide, mean_square, rows, with_saved_in_host_memory
from torch import Tensor, nn

import runtime.cuda
import runtime.state
from planner.errors import DeadlineError
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from runtime.build import make_executor
from runtime.cuda import CudaStreams
from runtime.executor import Executor
from runtime.host import HostMemory
from runtime.host_updates import HostUpdates
from runtime.local import LocalHub, LocalTransport
from runtime.rooms import HostCopy, Rooms
from runtime.run_ahead import MOST_AHEAD, RunAhead
from runtime.transport import Pending, Then

WIDE = model_of(lambda: Wide(Twice, 4), mean_square, rows)
STAGES = (0, 1, 2, 3, 5)
CLIPPED = PlanOptions(deadline_seconds=20, clip_norm=1.0, check_finite=True)


def as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: Device | None = None, deadline_seconds: float = 20
) -> None:
    """Executors that are built from now on issue as they do on a GPU."""

    def streams(_: Plan, world_rank: int, where: torch.device) -> CudaStreams:
        here = f"rank {world_rank}"
        return CudaStreams(where, here, deadline_seconds, cuda=device or Device())

    monkeypatch.setattr(runtime.state, "streams_of", streams)


def executor_of(made: Plan, model_file: Any) -> Executor:
    transport = LocalTransport(LocalHub(made.grid, 20), 0)
    return make_executor(made, model_file, transport, 0, CPU)


def offloaded(**choices: Any) -> Plan:
    """Everything that may leave the device does."""
    choices.setdefault("options", CLIPPED)
    return plan_of(
        WIDE, (0, 1, 2, 4), micro_batch_size=1, offload_state=True,
        offload_inputs=True, **choices,
    )  # fmt: skip


def races_with_copies(device: Device, monkeypatch: pytest.MonkeyPatch) -> Races:
    """Copies to the host are hidden from modes: so they are noted by hand."""
    races, copied = Races(device), HostMemory._copied

    def noting(host: HostMemory, tensor: Tensor) -> HostCopy:
        copy = copied(host, tensor)
        races.use("copy to the host", [tensor], [copy.tensor])
        return copy

    monkeypatch.setattr(HostMemory, "_copied", noting)
    return races


def note_host_jobs(races: Races, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the thread of updates does counts. Whoever waits for it, or takes a room that it gave
    back, comes after it."""
    submit, give_back, take = HostUpdates.submit, Rooms.give_back, Rooms.take
    told: dict[HostCopy, dict[Stream, int]] = {}

    def noting(thread: HostUpdates, job: Callable[[], None], what: str) -> Pending:
        noted = HostJob(job, device, races)
        return Then(submit(thread, noted.run, what), noted.was_waited_for)

    def giving(rooms: Rooms, copies: Iterable[HostCopy]) -> None:
        given = list(copies)
        told.update(dict.fromkeys(given, device.seen()))
        give_back(rooms, given)

    def taking(rooms: Rooms, *wanted: Any) -> HostCopy:
        taken = take(rooms, *wanted)
        device.see(told.pop(taken, {}))
        return taken

    monkeypatch.setattr(HostUpdates, "submit", noting)
    monkeypatch.setattr(Rooms, "give_back", giving)
    monkeypatch.setattr(Rooms, "take", taking)


def races_of(made: Plan, monkeypatch: pytest.MonkeyPatch) -> Races:
    """Of three steps and an evaluation between them."""
    device = Device()
    as_on_a_gpu(monkeypatch, device)
    races = races_with_copies(device, monkeypatch)
    executor = executor_of(made, WIDE)
    executor.step(WIDE.example_batch(made.replica_batch_size))  # makes the optimizer's state
    note_host_jobs(races, device, monkeypatch)
    with races:
        for _ in range(2):
            executor.step(WIDE.example_batch(made.replica_batch_size))
            executor.evaluate(WIDE.example_batch(made.replica_batch_size))
    executor.close()
    return races


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_all_that_runs_beside_compute_is_ordered_by_buffers(
    schedule: Schedule, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = offloaded(schedule=schedule, recompute=recompute)
    races = races_of(made, monkeypatch)
    assert races.found == []
    assert len(races.streams) == 3  # compute, copies in and copies out


def test_what_stages_save_is_ordered_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_saved_in_host_memory(plan_of(WIDE, (0, 1, 2, 4), micro_batch_size=1))
    assert races_of(made, monkeypatch).found == []


@pytest.mark.parametrize(
    ("broken", "name"), [(runtime.cuda._Copying, "follow"), (Stream, "wait_stream")]
)
def test_each_wait_is_needed(broken: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = offloaded()
    monkeypatch.setattr(broken, name, lambda *_: None)
    assert races_of(made, monkeypatch).found


@pytest.mark.parametrize("is_behind", [True, False])
def test_room_is_taken_again_behind_who_still_reads_it(
    is_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    host = HostMemory(CudaStreams(CPU, "rank 0", 20, cuda=device))
    races = races_with_copies(device, monkeypatch)
    if not is_behind:
        monkeypatch.setattr(CudaStreams, "behind", lambda *_: None)
    with races:
        host.keep("host:a.0", torch.ones(8)).wait()
        value, pending = host.fetch("host:a.0")
        host.drop("host:a.0")
        kept = host.keep("host:a.1", torch.zeros(8))  # its room, while it is still read
        pending.wait()
        kept.wait()
        assert value.sum() == 8
    assert bool(races.found) != is_behind


def test_copies_keep_what_they_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing waits for a copy before its tensor is let go."""
    made = offloaded()
    programs = tuple(
        tuple(i for i in program if i.opcode is not Opcode.RELEASE) for program in made.programs
    )
    careless = replace(made, programs=programs)
    assert races_of(careless, monkeypatch).found == []

    def without(self: Any, streams: Any, event: Any, _: Any) -> None:
        self._streams, self.event, self._held = streams, event, ()

    monkeypatch.setattr(runtime.cuda._Copying, "__init__", without)
    assert "freed" in races_of(careless, monkeypatch).found


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("schedule", [Schedule.LAYERED, Schedule.PLAIN])
def test_updates_on_the_host_are_ordered_with_copies(
    schedule: Schedule, save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(CLIPPED, update_on_host=True, save=save)
    races = races_of(offloaded(schedule=schedule, options=options), monkeypatch)
    assert races.found == []
    assert len(races.streams) == 4  # the host's thread is one more


def test_updates_on_the_host_wait_for_what_is_copied_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = offloaded(options=replace(CLIPPED, update_on_host=True))
    monkeypatch.setattr(CudaStreams, "blocking", lambda *_: lambda: None)
    assert races_of(made, monkeypatch).found


@pytest.mark.parametrize("options", updates.OPTIONS)
@pytest.mark.parametrize("layout", ["stages", "two replicas, 3"])
def test_updates_on_the_host_leave_the_bits_of_those_on_a_cpu(
    layout: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device, on_host = updates.pair(updates.LAYOUTS[layout], updates.OPTIONS[options])
    wanted = updates.trained(on_device)
    as_on_a_gpu(monkeypatch)
    updates.assert_equal(wanted, updates.trained(on_host))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_is_trained(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    model_file = linears()
    for num_ranks, stages in ((1, (0, 5)), (2, (0, 2, 5))):
        made = plan_of(model_file, stages, num_pipeline_ranks=num_ranks, **layout)
        assert_same(model_file, made, 1e-6 if made.num_replicas > 1 else 0.0)


def test_figures_are_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)))
    options = PlanOptions(deadline_seconds=20, clip_norm=1.0, check_finite=True)
    made = plan_of(model_file, STAGES, options=options)
    given = batches(made, model_file, 0)[0]
    read: list[Event] = []

    def query(event: Event) -> bool:
        read.append(event)
        return True

    monkeypatch.setattr(Event, "query", query)
    result = executor_of(made, model_file).step(given)
    assert result.finite is True
    before = list(read)
    norm = result.gradient_norm
    (event,) = read[len(before) :]
    assert event not in before
    monkeypatch.undo()
    assert norm == executor_of(made, model_file).step(given).gradient_norm


def test_the_timeline_is_of_the_streams_where_things_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    as_on_a_gpu(monkeypatch, device)
    made = offloaded()
    executor = executor_of(made, WIDE)
    for _ in range(2):
        result = executor.step(WIDE.example_batch(made.replica_batch_size))
    events = result.measured._events  # type: ignore[attr-defined]
    for index, instruction in enumerate(made.programs[0]):
        start, end = events[2 * index + 1 : 2 * index + 3]
        assert start.stream is end.stream
        assert (start.stream is device.compute) == (instruction.stream == "compute"), index
    timeline = result.timeline
    assert [event.index for event in timeline.events] == list(range(len(made.programs[0])))
    assert all(0 <= event.start_seconds <= event.end_seconds for event in timeline.events)
    assert timeline.step_seconds > 0
    assert result.timeline == timeline  # the events are read once


def test_sends_are_kept_until_they_are_over_and_hold_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on_a_gpu(monkeypatch)
    model_file = linears()
    made = plan_of(model_file, STAGES, num_pipeline_ranks=2)
    given = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> tuple[int, int]:
        executor.step(given)
        return executor.traffic.num_calls.get("send", 0), len(executor._rank.sends._kept)

    for num_sent, num_kept in on_every_rank(made, model_file, run):
        assert num_sent > 0
        assert num_kept == 0


@pytest.mark.parametrize("is_gpu", [False, True])
def test_memory_is_let_go_with_its_executor(is_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when Python looks for cycles: the next one may need it."""
    if is_gpu:
        as_on_a_gpu(monkeypatch)
    made = offloaded()
    executor = executor_of(made, WIDE)
    executor.step(WIDE.example_batch(made.replica_batch_size))
    rank = executor._rank
    found = [weakref.ref(rank.host), *map(weakref.ref, rank.resident_tensors())]
    executor.close()
    gc.collect()
    gc.disable()
    try:
        del executor, rank
        assert [each() for each in found] == [None] * len(found)
    finally:
        gc.enable()


class Slow:
    """An event that passes when it is told to."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over


def test_a_process_is_ahead_by_so_many_computes_and_no_more() -> None:
    issued: list[Slow] = []

    def event() -> Slow:
        issued.append(Slow())
        return issued[-1]

    run_ahead = RunAhead(event, 0.05, lambda: DeadlineError("late"), most=3)
    for _ in range(3):
        run_ahead.begin()
        run_ahead.end()
    with pytest.raises(DeadlineError, match="late"):
        run_ahead.begin()
    assert len(issued) == 3
    run_ahead = RunAhead(event, 20, lambda: DeadlineError("late"), most=1)
    run_ahead.begin()
    run_ahead.end()
    issued[-1].is_over = True
    run_ahead.begin()
    assert MOST_AHEAD > 1


def test_a_device_that_is_stuck_names_what_it_is_stuck_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    as_on_a_gpu(monkeypatch, device, deadline_seconds=0.05)
    made = offloaded(num_micro_batches=8)
    executor = executor_of(made, WIDE)
    monkeypatch.setattr(Event, "query", lambda event: event.stream is device.compute)
    executor.step(WIDE.example_batch(made.replica_batch_size))
    monkeypatch.setattr(Event, "query", lambda _: False)
    first = next(i for i in made.programs[0] if i.stream != "compute")
    with pytest.raises(DeadlineError, match=f"rank 0: {first.opcode}.*deadline of 0.05 s"):
        executor.step(WIDE.example_batch(made.replica_batch_size))


def test_a_batch_is_loaded_beside_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first compute that reads it waits for it; until then nobody does."""
    device = Device()
    as_on_a_gpu(monkeypatch, device)
    model_file = linears()
    made = plan_of(model_file, STAGES)
    executor = executor_of(made, model_file)
    waiting = [
        instruction.opcode
        for instruction, conflicts in zip(
            made.programs[0], executor._rank.training.conflicts, strict=True
        )
        if any(name.startswith("batch:") for name in conflicts.written)
    ]
    assert set(waiting) == {Opcode.FORWARD}
    assert len(waiting) == 2 * made.num_micro_batches  # inputs, and what the loss needs
