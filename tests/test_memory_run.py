"""Whole steps: what every rank really holds at its peak, against the bound that its plan states."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import Chain, model_of, plan_of, vectors
from stepping import batches, on_every_rank
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from training import EXAMPLES
from zoo import PATHS

from planner.measure.optimizer import OptimizerSlots, optimizer_slots
from planner.model_file import ModelFile, load_model_file
from planner.plan.types import Opcode, Plan, PlanOptions
from planner.precision import Precision
from planner.simulate.memory import worst_moments
from planner.storages import LiveStorages, StorageWatcher
from planner.trace import trace
from runtime.buffers import MOST_KEPT_BYTES
from runtime.executor import Executor
from runtime.handlers.words import tensor_of
from runtime.local import LocalHub

UNDER = 1.01
"""Most that a rank may hold of its bound."""
SLACK_BYTES = 64
"""Scalars (losses and the like): the models are so small that these would show."""
OVER = 0.97
"""Least, where the order of issue is the only interleaving: on one rank."""


def options_of(model_file: ModelFile, **more: Any) -> PlanOptions:
    slots = optimizer_slots(model_file, is_cuda=False)
    return PlanOptions(
        deadline_seconds=60,
        optimizer_slots=slots.kept,
        update_slots_of_each=slots.of_each,
        update_slots_of_previous=slots.of_previous,
        update_slots_of_all=slots.of_all,
        **more,
    )


def plan(model_file: ModelFile, num_ranks: int, *, recompute: bool, **more: Any) -> Plan:
    """Two stages on each rank, where there are layers enough."""
    num_layers = len(trace(model_file).layer_graph(2).layers)
    num_stages = min(2, num_layers // num_ranks) * num_ranks
    boundaries = tuple(round(s * num_layers / num_stages) for s in range(num_stages + 1))
    return plan_of(
        model_file,
        boundaries,
        num_pipeline_ranks=num_ranks,
        recompute=recompute,
        **{"options": options_of(model_file), **more},
    )


def measured(made: Plan, model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Peak bytes of each world rank in its second step, when optimizers have their state.

    The batch is not counted: on a CPU, micro-batches are views of what the caller holds.
    """
    given = [batches(made, model_file, step) for step in range(2)]
    match = LocalHub._match

    def unseen(hub: LocalHub, key: Any) -> None:
        """What one thread copies for another is not its own."""
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            match(hub, key)

    def run(executor: Executor) -> int:
        executor.step(given[0][executor.replica])
        live = LiveStorages(given[1][executor.replica].values())
        for tensor in executor.resident_tensors():
            live.watch(tensor)
        with StorageWatcher(live):
            executor.step(given[1][executor.replica])
        return live.peak_bytes

    monkeypatch.setattr(LocalHub, "_match", unseen)
    return on_every_rank(made, model_file, run)


def without_batch(made: Plan) -> Plan:
    """The plan, were its batches nothing, but for what is cast when it is loaded."""
    cast = made.options.precision.compute_dtype
    return replace(
        made,
        buffers=tuple(
            tuple(
                replace(b, shape=(0,)) if b.name.startswith("batch:") and b.dtype != cast else b
                for b in table
            )
            for table in made.buffers
        ),
    )


def uncounted_bytes(made: Plan, rank: int) -> int:
    """Optimizers count steps for each parameter, and small tensors that were sent are kept."""
    units = [unit for unit in made.units if rank in unit.ranks]
    tensors = {tensor.name: tensor.num_bytes for tensor in made.tensors}
    sent = [i.reads[0] for i in made.programs[rank] if i.opcode is Opcode.SEND]
    sent_bytes = sum(tensors[tensor_of(buffer)] for buffer in sent)
    kept_bytes = min(MOST_KEPT_BYTES, sent_bytes)
    return SLACK_BYTES + kept_bytes + 4 * sum(len(unit.parameters) for unit in units)


def assert_bounded(made: Plan, model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [moment.memory.total_bytes for moment in worst_moments(without_batch(made))]
    for world_rank, found in enumerate(measured(made, model_file, monkeypatch)):
        rank = made.coordinates(world_rank)[0]
        bound = bounds[rank]
        assert found <= UNDER * bound + uncounted_bytes(made, rank), (world_rank, found / bound)
        if made.world_size == 1:
            assert found >= OVER * bound, found / bound


@pytest.mark.parametrize(("num_ranks", "recompute"), [(1, False), (2, True)])
def test_wide_layers(num_ranks: int, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update's own tensors are the peak."""
    model_file = load_model_file(str(EXAMPLES / "mlp.py"))
    made = plan(model_file, num_ranks, recompute=recompute)
    worst = worst_moments(made)
    assert all(made.programs[r][m.index].opcode is Opcode.UPDATE for r, m in enumerate(worst))
    assert_bounded(made, model_file, monkeypatch)


def test_a_transformer_that_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage inputs stay until backward, which reads them."""
    model_file = load_model_file(str(PATHS["gpt2"]))
    assert_bounded(plan(model_file, 2, recompute=True), model_file, monkeypatch)


@pytest.mark.parametrize("name", ["buffers_in_forward", "lora", "recurrent", "unet"])
def test_on_one_rank_the_bound_is_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that change, frozen parameters, workspaces of the library, and gradients of skips,
    which are parts of larger ones."""
    model_file = load_model_file(str(PATHS[name]))
    assert_bounded(plan(model_file, 1, recompute=True), model_file, monkeypatch)


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(size: int) -> dict[str, Tensor]:
        return {key: value.bfloat16() for key, value in vectors(size).items()}

    def build() -> nn.Module:
        return Chain(lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)))

    model_file = model_of(lambda: build().bfloat16(), batch=batch)
    assert_bounded(plan(model_file, 2, recompute=recompute), model_file, monkeypatch)


MIXED = [
    {"num_ranks": 1},
    {"num_ranks": 2, "recompute": True},
    {"num_ranks": 1, "offload_state": True},
    {"num_ranks": 1, "num_replicas": 2, "partition": 1},
    {"num_ranks": 1, "num_replicas": 2, "partition": 2, "recompute": True},
    {"num_ranks": 1, "num_replicas": 2, "partition": 3},
]


@pytest.mark.parametrize("layout", MIXED, ids=str)
def test_mixed_precision(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters beside what is computed with; float batches are copies in the compute type."""
    model_file = load_model_file(str(EXAMPLES / "mlp.py"))
    for precision in (Precision.BFLOAT16, Precision.FLOAT16):
        is_scaled = precision is Precision.FLOAT16
        options = options_of(model_file, precision=precision, check_finite=is_scaled)
        choices = {"num_ranks": 1, "recompute": False, **layout, "options": options}
        assert_bounded(plan(model_file, **choices), model_file, monkeypatch)


def test_exceptions_from_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts around modules that stay in float32 are counted as they are made."""
    model_file = replace(load_model_file(str(PATHS["gpt2"])), keep_float32=("*.ln_*", "*.bias"))
    kept = model_file.keep_float32
    options = options_of(model_file, precision=Precision.BFLOAT16, keep_float32=kept)
    made = plan(model_file, 1, recompute=False, options=options)
    assert {unit.weights_dtype for unit in made.units} == {"bfloat16", "float32"}
    assert_bounded(made, model_file, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "lora", "resnet", "bert"])
def test_zoo_in_mixed_precision(name: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = load_model_file(str(PATHS[name]))
    options = options_of(model_file, precision=Precision.BFLOAT16)
    made = plan(model_file, num_ranks, recompute=False, options=options)
    assert_bounded(made, model_file, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_zoo(path: Path, num_ranks: int, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = load_model_file(str(path))
    made = plan(model_file, num_ranks, recompute=recompute)
    assert_bounded(made, model_file, monkeypatch)


Build = Callable[[Any], torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("build", "is_cuda", "expected"),
    [
        (torch.optim.AdamW, False, (2, 2.0, 1.0, 0.0)),
        (torch.optim.AdamW, True, (2, 0.0, 0.0, 1.0)),
        (lambda p: torch.optim.AdamW(p, foreach=True), False, (2, 0.0, 0.0, 1.0)),
        (lambda p: torch.optim.AdamW(p, fused=True), True, (2, 0.0, 0.0, 0.0)),
        (torch.optim.SGD, False, (0, 0.0, 0.0, 0.0)),
        (lambda p: torch.optim.SGD(p, momentum=0.9), False, (1, 0.0, 0.0, 0.0)),
        (torch.optim.Adagrad, False, (1, 1.0, 1.0, 0.0)),
    ],
)
def test_what_optimizers_keep_and_make(
    build: Build, is_cuda: bool, expected: tuple[int, float, float, float]
) -> None:
    model_file = replace(model_of(lambda: Chain(lambda: nn.Linear(8, 8))), build_optimizer=build)
    kept, of_each, of_previous, of_all = expected
    assert optimizer_slots(model_file, is_cuda=is_cuda) == OptimizerSlots(
        kept=kept, of_each=of_each, of_previous=of_previous, of_all=of_all
    )


def test_an_update_makes_less_on_each_replica_where_the_state_is_partitioned() -> None:
    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8, bias=False)))
    made = {
        number: plan_of(
            model_file, (0, 1, 5), num_replicas=number, options=options_of(model_file)
        ).units[0]
        for number in (1, 2)
    }
    assert made[1].update_transient_bytes == 2 * 8 * 8 * 4
    assert made[2].update_transient_bytes == 2 * 8 * 8 * 4 // 2
