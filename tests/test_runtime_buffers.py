"""Buffers at run time are what the plan's table and its memory bound say they are."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from planned import Chain, assert_same, model_of, plan_of
from stepping import LAYOUTS, batches, on_every_rank
from test_parity_schedules import MODELS, plan
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planner.check import check
from planner.plan.names import buffer_key, stream_of
from planner.plan.types import Instruction, Opcode, Plan, PlanOptions
from planner.schedules import Schedule
from planner.simulate.memory import host_memory
from runtime.buffers import Buffers
from runtime.executor import Executor
from runtime.handlers import HANDLERS
from runtime.handlers.data import reduce
from runtime.handlers.table import each_time
from runtime.state import RankState


class Noting(Buffers):
    """Buffers that note what is put in them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, tuple[str, tuple[int, ...]]] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            self.noted[buffer_key(name)] = dtype, tuple(value.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_tensors_have_the_types_and_shapes_of_the_table(name: str, layout: dict[str, Any]) -> None:
    options = PlanOptions(deadline_seconds=20, clip_norm=1.0, check_finite=True)
    made = plan(name, options=options, **layout)
    given = batches(made, MODELS[name], 0)

    def run(executor: Executor) -> tuple[int, dict[str, tuple[str, tuple[int, ...]]]]:
        noting = executor._rank.buffers = Noting()
        executor.step(given[executor.replica])
        executor.evaluate(given[executor.replica])
        return executor.rank, noting.noted

    seen = set()
    for rank, noted in on_every_rank(made, MODELS[name], run):
        table = {buffer.name: (buffer.dtype, buffer.shape) for buffer in made.buffers[rank]}
        for key, found in noted.items():
            if key.startswith("reduced:") and made.partition == 0:  # parameters are aligned here
                assert found[1] >= table[key][1]
                found = found[0], table[key][1]
            assert found == table[key], key
        seen |= noted.keys()
    assert {"scale", "finite", "loss"} <= seen


def reducing_each_micro_batch(made: Plan) -> Plan:
    """With two micro-batches: a REDUCE after the first of them too, and the second adds to it."""
    program: list[Instruction] = []
    for instruction in made.programs[0]:
        sums = tuple(name for name in instruction.writes if name.startswith("sum:"))
        if instruction.opcode is Opcode.BACKWARD and instruction.micro_batch == 0:
            unit = f"stage.{instruction.stage}"
            first = Instruction(
                opcode=Opcode.REDUCE,
                stream=stream_of(Opcode.REDUCE),
                unit=unit,
                reads=sums,
                writes=(f"reduced:{unit}",),
            )
            program += [instruction, first]
        elif instruction.opcode is Opcode.BACKWARD:
            reads = tuple(name for name in instruction.reads if name not in sums)
            program.append(replace(instruction, reads=reads))
        elif instruction.opcode is Opcode.REDUCE:
            reads = (*instruction.reads, *instruction.writes)
            program.append(replace(instruction, reads=reads))
        else:
            program.append(instruction)
    found = replace(made, programs=(tuple(program),), schedule=Schedule.PLAIN)
    verdict = check(found)
    assert verdict.passed, verdict
    return found


@pytest.mark.parametrize("partition", [0, 3])
def test_adding_to_a_reduced_gradient_takes_no_memory_of_its_own(
    partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of the sum that this rank reduces is where it is reduced to: the sum is spent."""
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8, bias=False)))
    choices: dict[str, Any] = {"num_replicas": 2, "partition": partition, "num_micro_batches": 2}
    made = reducing_each_micro_batch(plan_of(model_file, (0, 2, 5), **choices))
    assert_same(model_file, made, 1e-6)
    is_in_sum: dict[bool, set[bool]] = {False: set(), True: set()}

    def noting(rank: RankState, instruction: Instruction) -> None:
        """Whether the transport leaves its result in the memory of the sum."""
        sums = {tensor.untyped_storage().data_ptr() for tensor in rank.sums.tensors.values()}

        def note(result: Tensor) -> None:
            adds = len(instruction.reads) == 2
            is_in_sum[adds].add(result.untyped_storage().data_ptr() in sums)

        transport = rank.transport
        add, scatter = transport.all_reduce, transport.reduce_scatter
        with monkeypatch.context() as changed:
            changed.setattr(
                transport, "all_reduce", lambda x, what, source: (note(x), add(x, what, source))[1]
            )
            changed.setattr(
                transport, "reduce_scatter", lambda x, y, what: (note(y), scatter(x, y, what))[1]
            )
            reduce(rank, instruction)

    monkeypatch.setitem(HANDLERS, Opcode.REDUCE, each_time(noting))
    given = batches(made, model_file, 0)
    on_every_rank(made, model_file, lambda executor: executor.step(given[executor.replica]))
    assert is_in_sum == {False: {False}, True: {True}}


@pytest.mark.parametrize("offload_state", [False, True])
def test_two_checkpoints_are_in_host_memory_while_one_is_made(offload_state: bool) -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8, bias=False)))
    options = PlanOptions(deadline_seconds=20, save=True)
    made = plan_of(model_file, (0, 2, 5), offload_state=offload_state, options=options)
    given = batches(made, model_file, 0)[0]

    def run(executor: Executor) -> int:
        executor.step(given)
        before = executor.checkpoint()  # held by the executor until the next one is complete
        executor.step(given)
        found = pytree.tree_leaves([asdict(before), asdict(executor.checkpoint())])
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.dim()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    assert on_every_rank(made, model_file, run)[0] == host_memory(made)[0]
