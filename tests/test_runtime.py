"""Parts of the runtime on their own: keys, data, optimizers, batches, memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planned import plan_of
from torch import Tensor, nn
from training import even_plan, example, train_by_plan

from planner.errors import ModelFileError, PlanFileError, UsageError
from planner.model_file import model_from_functions
from planner.plan.code import Reference, Statement
from runtime.build import make_executor
from runtime.code import StageProgram
from runtime.data import Batches
from runtime.executor import Executor
from runtime.local import run_local
from runtime.memory import peak_memory
from runtime.optimize import UnitOptimizer
from runtime.random import KeyedRandom, key_of, seeded
from runtime.shards import UnitState

CPU = torch.device("cpu")


def drop_twice(random: KeyedRandom, **words: int) -> tuple[Tensor, Tensor]:
    random.begin(**{"step": 0, "replica": 0, "micro_batch": 0, **words})
    ones = torch.ones(64)
    with random:
        return nn.functional.dropout(ones, 0.5), nn.functional.dropout(ones, 0.5)


def test_keys_decide_the_mask() -> None:
    first, second = drop_twice(KeyedRandom(1))
    again = drop_twice(KeyedRandom(1))
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    for words in ({"step": 1}, {"replica": 1}, {"micro_batch": 1}):
        assert not torch.equal(first, drop_twice(KeyedRandom(1), **words)[0])
    assert not torch.equal(first, drop_twice(KeyedRandom(2))[0])


def test_seek_continues_in_the_middle_of_the_forward() -> None:
    _, second = drop_twice(KeyedRandom(1))
    random = KeyedRandom(1)
    random.begin(step=0, replica=0, micro_batch=0)
    random.seek(1)
    with random:
        assert torch.equal(nn.functional.dropout(torch.ones(64), 0.5), second)


def test_what_runs_again_from_a_saved_state_draws_the_same() -> None:
    random, drawn = KeyedRandom(1), []
    before = torch.get_rng_state()
    for _ in range(2):
        random.begin(step=0, replica=0, micro_batch=0)
        with random:
            first = nn.functional.dropout(torch.ones(64), 0.5)
            state = torch.get_rng_state()
            second = nn.functional.dropout(torch.ones(64), 0.5)
            third = nn.functional.dropout(torch.ones(64), 0.5)
            torch.set_rng_state(state)
            drawn.append(nn.functional.dropout(torch.ones(64), 0.5))
        assert torch.equal(drawn[-1], second)
        assert not torch.equal(second, first)
        assert not torch.equal(second, third)
    assert torch.equal(*drawn)
    assert random.num_draws == 8
    assert torch.equal(before, torch.get_rng_state())


def test_random_operators_without_a_generator_argument_are_keyed_too() -> None:
    def draw() -> Tensor:
        random = KeyedRandom(3)
        random.begin(step=0, replica=0, micro_batch=0)
        query = torch.ones(1, 1, 8, 4)
        with random:
            return nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)

    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, draw())


def test_keys_are_spread_and_seeding_leaves_no_trace() -> None:
    assert len({key_of(a, b) for a in range(50) for b in range(50)}) == 2500
    before = torch.get_rng_state()
    with seeded(7, CPU):
        inside = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(7, CPU):
        assert torch.equal(inside, torch.rand(3))


def test_code_that_the_model_does_not_have_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for function, path in (("layer", "1"), ("aten.no_such_operator.default", "")):
        statement = Statement(target="y", function=function, path=path, arguments=(Reference("x"),))
        with pytest.raises(PlanFileError, match="does not have"):
            StageProgram([statement], ["y"], model, CPU, KeyedRandom(0), None)


def test_optimizers_that_need_whole_parameters_are_refused_on_pieces() -> None:
    class Whole(torch.optim.SGD):
        pass

    plan = even_plan("mlp", num_replicas=2, partition=3)
    state = UnitState(plan.units[0], plan, example("mlp")[0].build_model(), replica=1)
    with pytest.raises(UsageError, match="Whole may need whole parameters"):
        UnitOptimizer(state, lambda parameters: Whole(parameters, lr=0.1), None)
    with pytest.raises(UsageError, match="LBFGS"):
        UnitOptimizer(state, lambda parameters: torch.optim.LBFGS(parameters, lr=0.1), None)


def test_parameter_groups_survive_partition() -> None:
    def build(parameters: Any) -> torch.optim.Optimizer:
        listed = list(parameters)
        matrices = [p for p in listed if p.dim() > 1]
        vectors = [p for p in listed if p.dim() <= 1]
        return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    plan = even_plan("mlp", num_replicas=2, partition=3)
    for replica in (0, 1):
        state = UnitState(plan.units[0], plan, example("mlp")[0].build_model(), replica)
        groups = UnitOptimizer(state, build, None).optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
        pieces = [parameter for group in groups for parameter in group["params"]]
        assert sum(p.numel() for p in pieces) == sum(p.parameter.numel() for p in state.pieces)
        assert all(p.dim() == 1 for p in pieces)


def test_pieces_of_all_replicas_cover_every_parameter_once() -> None:
    plan = even_plan("mlp", num_replicas=3, partition=3)
    model = example("mlp")[0].build_model()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (unit,) = plan.units
    found: dict[str, list[Tensor]] = {}
    for replica in range(3):
        for piece in UnitState(unit, plan, model, replica).pieces:
            found.setdefault(piece.name, []).append(piece.parameter.detach())
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), expected[name].reshape(-1)), name


def test_batches_of_a_dataset_are_each_sample_once_per_epoch() -> None:
    class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if index >= 8:
                raise IndexError
            return {"x": torch.tensor(index)}

    plan = even_plan("mlp", num_replicas=2, micro_batch_size=2)
    batches = Batches(replace(example("mlp")[0], build_dataset=Numbers), plan)
    assert not batches.is_random
    epoch = [batches.batch(step, r)["x"] for step in (0, 1) for r in (0, 1)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(8))
    second = [batches.batch(step, r)["x"] for step in (2, 3) for r in (0, 1)]
    assert sorted(torch.cat(second).tolist()) == list(range(8))
    assert torch.cat(epoch).tolist() != torch.cat(second).tolist()
    assert torch.equal(batches.batch(0, 1)["x"], epoch[1])


def test_datasets_that_cannot_fill_a_step_are_refused() -> None:
    plan = even_plan("mlp", num_replicas=2)
    model_file = example("mlp")[0]
    with pytest.raises(ModelFileError, match="returned 3 samples, but one step takes 4"):
        Batches(replace(model_file, build_dataset=lambda: [1, 2, 3]), plan)
    with pytest.raises(ModelFileError, match="without a length"):
        Batches(replace(model_file, build_dataset=lambda: iter([])), plan)


def test_random_batches_depend_on_step_and_replica_only() -> None:
    plan = even_plan("mlp", num_replicas=2)
    batches = Batches(replace(example("mlp")[0], build_dataset=None), plan)
    assert batches.is_random
    first = batches.batch(0, 0)
    for key, value in first.items():
        assert torch.equal(value, batches.batch(0, 0)[key])
    assert any(not torch.equal(v, batches.batch(1, 0)[k]) for k, v in first.items())
    assert any(not torch.equal(v, batches.batch(0, 1)[k]) for k, v in first.items())


@pytest.mark.parametrize("fault", ["missing", "size"])
def test_a_wrong_batch_names_the_key_and_the_sizes(fault: str) -> None:
    plan = even_plan("mlp", num_micro_batches=2)
    model_file = example("mlp")[0]
    key = plan.batch[0].name

    def run(transport: Any, world_rank: int) -> None:
        executor = make_executor(plan, model_file, transport, world_rank, CPU)
        batch = dict(model_file.example_batch(4))
        if fault == "missing":
            del batch[key]
        else:
            batch[key] = batch[key][:3]
        try:
            executor.step(batch)
        finally:
            executor.close()

    with pytest.raises(UsageError, match=key):
        run_local(plan, run)


def test_measured_timeline_has_an_event_for_every_instruction() -> None:
    plan = even_plan("mlp", num_pipeline_ranks=2, num_micro_batches=2)
    model_file = example("mlp")[0]

    def run(transport: Any, world_rank: int) -> Any:
        executor = make_executor(plan, model_file, transport, world_rank, CPU)
        timeline = executor.step(model_file.example_batch(4)).timeline
        executor.close()
        return timeline

    for rank, timeline in enumerate(run_local(plan, run)):
        assert [event.index for event in timeline.events] == list(range(len(plan.programs[rank])))
        assert all(0 <= e.start_seconds <= e.end_seconds for e in timeline.events)


def test_peak_memory_counts_live_bytes() -> None:
    resident = torch.zeros(1000)
    with peak_memory([resident], CPU) as peak:
        a = torch.zeros(250)
        b = a + 1
        del a
        c = b * 2
        del b, c
    assert peak.num_bytes == 4000 + 2000


def test_executor_frees_the_parameters_of_other_ranks() -> None:
    plan = even_plan("mlp", num_pipeline_ranks=2)
    model_file = example("mlp")[0]
    whole = sum(parameter.numel() for parameter in model_file.build_model().parameters())

    def run(transport: Any, world_rank: int) -> int:
        model = model_file.build_model()
        executor = Executor(plan, model, transport, world_rank, loss_fn=model_file.loss_fn)
        executor.close()
        return sum(parameter.numel() for parameter in model.parameters())

    held = run_local(plan, run)
    assert sum(held) == whole
    assert all(0 < part < whole for part in held)


def test_state_holds_what_the_models_own_state_dict_holds() -> None:
    class Tables(nn.Module):
        """A layer with a buffer to save and one that is made anew."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("made", torch.ones(4), persistent=False)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return input * self.weight * self.kept * self.made

    model_file = model_from_functions(
        lambda: nn.Sequential(Tables(), Tables()),
        lambda batch_size: {"input": torch.randn(batch_size, 4)},
        loss_fn=lambda output, _: output.square().mean(),
    )
    plan = plan_of(model_file, (0, 1, 2), num_pipeline_ranks=2)
    state = train_by_plan(model_file, plan, num_steps=1).state
    assert state.keys() == model_file.build_model().state_dict().keys()
