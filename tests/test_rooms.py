"""Copies in host memory take turns, and none changes under who holds it."""

from typing import Any

import pytest
import torch
from planned import model_of, plan_of
from stepping import CPU, batches, on_every_rank
from test_runtime_offload import Twice, Wide, mean_square, rows
from torch import Tensor

import runtime.host
from planner.plan.types import PlanOptions
from runtime.executor import Executor
from runtime.host import HostMemory
from runtime.rooms import Rooms
from runtime.streams import CpuStreams


@pytest.fixture
def host() -> HostMemory:
    return HostMemory(CpuStreams())


def kept(host: HostMemory, name: str) -> Tensor:
    values = host.values(name)
    assert isinstance(values, Tensor)
    return values


@pytest.mark.parametrize("size", [1, 5])
def test_the_room_of_what_was_dropped_is_taken_again(host: HostMemory, size: int) -> None:
    host.keep("host:h.0", torch.ones(size)).wait()
    place = kept(host, "host:h.0").data_ptr()
    host.drop("host:h.0")
    host.keep("host:h.1", torch.zeros(size)).wait()
    assert kept(host, "host:h.1").data_ptr() == place
    host.keep("host:h.2", torch.zeros(size, dtype=torch.int32)).wait()  # of another type
    host.keep("host:h.3", torch.zeros(size + 1)).wait()
    assert len({kept(host, f"host:h.{m}").data_ptr() for m in (1, 2, 3)}) == 3


def test_what_a_value_held_itself_may_be_kept_in_its_place(host: HostMemory) -> None:
    """As a checkpoint that is taken up does with what optimizers keep."""
    host.keep("host:moments:u", {"w": {"x": torch.ones(4), "y": torch.zeros(4)}}).wait()
    held = host.values("host:moments:u")["w"]
    host.keep("host:moments:u", {"w": {"x": held["y"], "y": held["x"]}}).wait()
    swapped = host.values("host:moments:u")["w"]
    assert torch.equal(swapped["x"], torch.zeros(4))
    assert torch.equal(swapped["y"], torch.ones(4))


def test_a_checkpoint_that_was_handed_out_never_changes(host: HostMemory) -> None:
    found = []
    for step in range(1, 5):
        host.keep("host:shard:u", torch.full((4,), float(step))).wait()
        host.complete(step)
        if step % 2:
            found.append(host.checkpoint)
    assert [float(each.shards["u"].sum()) for each in found] == [4.0, 12.0]
    assert [each.num_steps for each in found] == [1, 3]


def test_checkpoints_that_nobody_takes_alternate_between_two_rooms(host: HostMemory) -> None:
    places = []
    for step in range(6):
        host.keep("host:shard:u", torch.full((4,), float(step))).wait()
        places.append(kept(host, "host:shard:u").data_ptr())
        host.complete(step)
    assert len(set(places)) == 2


def test_steps_after_the_first_make_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = model_of(lambda: Wide(Twice, 4), mean_square, rows)
    made = plan_of(
        model_file,
        (0, 1, 2, 4),
        options=PlanOptions(deadline_seconds=20, save=True),
        offload_state=True,
        offload_inputs=True,
    )
    given, num_made = batches(made, model_file, 0)[0], [0]
    make = runtime.host._make_room

    def counted(*arguments: Any) -> Tensor:
        num_made[0] += 1
        return make(*arguments)

    monkeypatch.setattr(runtime.host, "_make_room", counted)

    def run(executor: Executor) -> tuple[int, int]:
        for _ in range(2):  # the first has no checkpoint before it
            executor.step(given)
        before = num_made[0]
        for _ in range(3):
            executor.step(given)
        return before, num_made[0]

    ((before, after),) = on_every_rank(made, model_file, run)
    assert 0 < before == after


def test_rooms_are_by_layout() -> None:
    made: list[tuple[int, ...]] = []

    def make(
        shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, pin: bool
    ) -> Tensor:
        assert not pin
        made.append(strides)
        return torch.empty_strided(shape, strides, dtype=dtype)

    rooms = Rooms(make)
    square = torch.ones(3, 3)
    first = rooms.take(square)
    assert first.device == CPU
    rooms.give_back([first])
    assert rooms.take(square.t()) is not first
    assert rooms.take(square) is first
    assert made == [(3, 1), (1, 3)]


class Fleeting(list[Any]):
    """Another thread takes what is in it between the look and the grasp."""

    def __len__(self) -> int:
        return 1


def test_a_room_that_another_thread_has_just_taken_is_made_anew() -> None:
    made: list[tuple[Any, ...]] = []

    def make(*wanted: Any) -> Tensor:
        made.append(wanted)
        return torch.empty(5)

    rooms = Rooms(make)
    rooms.give_back([rooms.take(torch.ones(5))])
    rooms._free = {key: Fleeting() for key in rooms._free}
    rooms.take(torch.ones(5))
    assert len(made) == 2
