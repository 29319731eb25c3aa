"""Passes of lowering on their own."""

import pytest
from planned import Chain, model_of, plan_of
from test_runtime_edges import Skip
from torch import nn

from planner.plan.types import Opcode


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_a_gradient_is_not_received_into_a_buffer_that_it_still_has_to_leave(
    num_micro_batches: int,
) -> None:
    """The gradient of a skip passes through a rank several times, in one buffer."""
    model_file = model_of(lambda: Skip(lambda: nn.Linear(8, 8), 6))
    plan = plan_of(
        model_file,
        (0, 1, 2, 3, 4, 5, 7),
        num_pipeline_ranks=2,
        num_micro_batches=num_micro_batches,
    )
    assert all(unit.trainable for unit in plan.units)
    num_passes = 0
    for program in plan.programs:
        gone = {name: True for i in program for name in i.writes if name.startswith("gradient:")}
        for instruction in program:
            if instruction.opcode is Opcode.RECEIVE:
                (name,) = instruction.writes
                num_passes += gone.get(name, False)
                assert gone.get(name, True), name
                gone[name] = False
            if instruction.opcode is Opcode.BACKWARD:
                gone |= {name: False for name in instruction.writes if name in gone}
                gone |= {name: True for name in instruction.reads if name in gone}
            if instruction.opcode is Opcode.SEND and instruction.reads[0] in gone:
                gone[instruction.reads[0]] = True
    assert num_passes


def test_tied_parameters_make_one_unit_per_set_of_stages() -> None:
    class TwoTied(Chain):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Linear(8, 8))
            self.layers[2].weight = self.layers[0].weight
            self.layers[3].bias = self.layers[1].bias

    plan = plan_of(model_of(TwoTied), (0, 1, 2, 3, 5), num_pipeline_ranks=2)
    tied = {unit.parameters: unit for unit in plan.units if unit.name.startswith("tied.")}
    assert {names: unit.stages for names, unit in tied.items()} == {
        ("layers.0.weight",): (0, 2),
        ("layers.1.bias",): (1, 3),
    }
    assert all(unit.exact and len(unit.ranks) == 1 for unit in tied.values())
