"""The examples keep the model-file contract, and the loss of the GPT falls on its own data."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from planner.graph import LayerGraph
from planner.model_file import fingerprint, forward_keys, load_model_file
from planner.trace import trace

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if not path.stem.endswith("_training"))
"""Model files. The scripts beside them are run by the tests of the Python interface."""
MIN_LAYERS = 12
"""Four pipeline ranks of three stages each."""


@pytest.fixture(params=NAMES)
def example(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**{key: batch[key] for key in forward_keys(model, batch)})
    return output


def samples(example: ModuleType, num_samples: int) -> dict[str, Tensor]:
    dataset = example.build_dataset()
    batch: dict[str, Tensor] = default_collate([dataset[index] for index in range(num_samples)])
    return batch


def describe(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    state = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return [(name, tensor.shape, tensor.dtype) for name, tensor in state]


def test_all_four_examples_are_tested() -> None:
    assert NAMES == ["gpt", "mlp", "resnet", "unet"]


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_accepts_it_and_knows_the_model_again(name: str) -> None:
    model_file = load_model_file(str(EXAMPLES / f"{name}.py"))
    assert model_file.loss_fn is not None
    assert model_file.build_dataset is not None
    with torch.device("meta"):
        planned = fingerprint(model_file.build_model())
    assert fingerprint(model_file.build_model()) == planned


def test_meta_and_cpu_builds_agree(example: ModuleType) -> None:
    with torch.device("meta"):
        planned = example.build_model()
    built = example.build_model()
    assert describe(planned) == describe(built)
    assert all(parameter.is_meta for parameter in planned.parameters())
    assert all(parameter.device.type == "cpu" for parameter in built.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_finds_layers_for_a_deep_pipeline(name: str) -> None:
    graph = trace(load_model_file(str(EXAMPLES / f"{name}.py"))).layer_graph(2)
    assert len(graph.layers) >= MIN_LAYERS


def test_the_trace_sees_what_each_example_is_there_for() -> None:
    graphs = {
        name: trace(load_model_file(str(EXAMPLES / f"{name}.py"))).layer_graph(2) for name in NAMES
    }
    assert graphs["gpt"].tied_parameters == {"wte.weight": (0, len(graphs["gpt"].layers) - 1)}
    assert {name: graph.num_random_operators > 0 for name, graph in graphs.items()} == {
        "gpt": True, "mlp": False, "resnet": False, "unet": False
    }  # fmt: skip
    assert longest_skip(graphs["unet"]) > len(graphs["unet"].layers) // 2
    assert longest_skip(graphs["mlp"]) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_example_batch_has_the_form_of_stacked_samples(
    example: ModuleType, batch_size: int
) -> None:
    made, stacked = example.example_batch(batch_size), samples(example, batch_size)
    assert list(made) == list(stacked)
    for key, tensor in made.items():
        assert tensor.shape == stacked[key].shape
        assert tensor.dtype == stacked[key].dtype
        assert tensor.shape[0] == batch_size
        assert tensor.is_contiguous()


def test_dataset_ends(example: ModuleType) -> None:
    dataset = example.build_dataset()
    last = dataset[len(dataset) - 1]
    assert {key: value.shape for key, value in last.items()} == {
        key: value.shape[1:] for key, value in example.example_batch(1).items()
    }
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_dataset_is_the_same_whenever_it_is_built(example: ModuleType) -> None:
    first = samples(example, 4)
    torch.manual_seed(1)
    second = samples(example, 4)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loss_is_the_mean_over_samples(example: ModuleType, batch_size: int) -> None:
    model = example.build_model().eval()
    batch = samples(example, batch_size)
    with torch.no_grad():
        whole = example.loss_fn(run_forward(model, batch), batch)
        parts = []
        for index in range(batch_size):
            sample = {key: value[index : index + 1] for key, value in batch.items()}
            parts.append(example.loss_fn(run_forward(model, sample), sample))
    assert whole.shape == ()
    assert torch.isfinite(whole)
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_every_parameter_gets_a_gradient(example: ModuleType) -> None:
    model = example.build_model()
    batch = example.example_batch(2)
    example.loss_fn(run_forward(model, batch), batch).backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert missing == []


def test_a_few_plain_steps_lower_the_loss_of_the_gpt() -> None:
    gpt = load("gpt")
    model = gpt.build_model()
    optimizer = gpt.build_optimizer(model.parameters())
    scheduler = gpt.build_scheduler(optimizer)
    batches = DataLoader(gpt.build_dataset(), batch_size=16, shuffle=True)
    losses = []
    for batch in itertools.islice(batches, 4):
        loss = gpt.loss_fn(run_forward(model, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[3] < losses[0] - 0.3


def test_gpt_ties_its_embeddings() -> None:
    gpt = load("gpt")
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = gpt.build_model()
        assert model.lm_head.weight is model.wte.weight


def test_gpt_schedule_warms_up_then_decays_to_a_tenth() -> None:
    gpt = load("gpt")
    optimizer = gpt.build_optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = gpt.build_scheduler(optimizer)
    rates = []
    for _ in range(gpt.NUM_WARM_UP_STEPS + gpt.NUM_DECAY_STEPS + 10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < peak <= gpt.NUM_WARM_UP_STEPS
    assert max(rates) == pytest.approx(gpt.LEARNING_RATE)
    assert rates[-1] == pytest.approx(gpt.LEARNING_RATE / 10)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("gpt", {"WIDTH": 16, "NUM_HEADS": 2, "NUM_BLOCKS": 2, "CONTEXT": 8}),
        ("mlp", {"WIDTH": 8, "NUM_BLOCKS": 1, "NUM_INPUTS": 4, "NUM_OUTPUTS": 1}),
        ("resnet", {"WIDTHS": (4, 8), "NUM_BLOCKS_PER_GROUP": 1, "IMAGE_SIZE": 8}),
        ("unet", {"WIDTHS": (4, 8), "NUM_BLOCKS_PER_LEVEL": 1, "IMAGE_SIZE": 8}),
    ],
)
def test_constants_shrink_the_whole_example(name: str, constants: dict[str, object]) -> None:
    full = load(name)
    small = load(name)
    for key, value in constants.items():
        assert hasattr(small, key)
        setattr(small, key, value)
    model = small.build_model()
    batch = samples(small, 1)
    assert small.example_batch(1).keys() == batch.keys()
    assert torch.isfinite(small.loss_fn(run_forward(model.eval(), batch), batch))
    assert num_elements(model) < num_elements(full.build_model()) / 4


def longest_skip(graph: LayerGraph) -> int:
    """Layers between a tensor's maker and its last reader, over all tensors."""
    return max(max(readers) - graph.makers[name] for name, readers in graph.readers.items())


def num_elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
