"""What travels over a process group, by type; messages themselves are in test_transport.py."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from plans import minimal_plan

from runtime.exchange import Channel
from runtime.group_wire import GroupWire


class Posted(dist.ProcessGroup):
    """A group whose messages stay where they are."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.tensors: list[torch.Tensor] = []

    def send(self, tensors: list[torch.Tensor], *_: int) -> dist.Work:  # type: ignore[override]
        self.tensors += tensors
        return dist.Work()

    recv = send  # type: ignore[assignment]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16, torch.complex64])
@pytest.mark.parametrize("size", [1, 6])
def test_types_that_a_backend_lacks_travel_as_others(
    backend: str, dtype: torch.dtype, size: int
) -> None:
    made = minimal_plan(2, 1)
    plan = replace(made, cluster=replace(made.cluster, backend=backend))
    group, tensor = Posted(), torch.ones(size, dtype=dtype)
    wire = GroupWire(plan, 0, Channel("pair", (0, 1)), group)
    wire.send(1, tensor, "a message")
    wire.receive(1, tensor, "another")
    for travelling in group.tensors:
        assert travelling.data_ptr() == tensor.data_ptr()
        assert travelling.nbytes == tensor.nbytes
        expected = {torch.complex64: torch.float32}
        if backend == "nccl":
            expected[torch.int16] = torch.uint8
        assert travelling.dtype == expected.get(dtype, dtype)
    assert len(group.tensors) == 2
    assert wire.num_pending == 2
