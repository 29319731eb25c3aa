"""What cannot be traced is refused with the module, the line and a way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import own
from torch import nn

from planner.errors import LgaError, ModelFileError, TraceError
from planner.graph import LayerGraph
from planner.model_file import model_from_functions
from planner.trace import trace


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


class _ReadsValues(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class _HandsOverObject(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = _TakesObject()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x, object()))


class _TakesObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, _thing: object) -> torch.Tensor:
        return self.linear(x)


class _ChangesBatch(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return super().forward(x)


class _ChangesBuffer(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x) * self.count


class _LooseTensor(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(8.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table)


class _NoGradient(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class _Raises(_Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, :3])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_ReadsValues, ("between its layers", "test_trace_errors.py", "in forward", "torch.where")),
        (_HandsOverObject, ("'blocks.0'", "object", "layers = [...]")),
        (_ChangesBatch, ("batch's 'x'", "in place")),
        (_ChangesBuffer, ("buffer 'count'", "in place")),
        (_LooseTensor, ("(8,)", "register_buffer")),
        (_NoGradient, ("no trainable parameter",)),
        (_Raises, ("'blocks.0'", "layers = [...]")),
    ],
)
def test_refused(build: Callable[[], nn.Module], words: tuple[str, ...]) -> None:
    with pytest.raises(TraceError) as raised:
        trace(model_from_functions(build, own.vectors, loss_fn=own.square))
    for word in words:
        assert word in str(raised.value)
    assert raised.value.hint


def test_listing_the_layers_is_a_way_out() -> None:
    layers = ("blocks.0", "blocks.1")
    model_file = model_from_functions(_ReadsValues, own.vectors, loss_fn=own.square, layers=layers)
    graph = trace(model_file).layer_graph(2)
    assert [layer.name for layer in graph.layers] == list(layers)


def test_listed_layer_that_does_not_exist() -> None:
    model_file = model_from_functions(_Base, own.vectors, loss_fn=own.square, layers=("blocks.7",))
    with pytest.raises(ModelFileError, match=r"blocks\.7"):
        trace(model_file)


def _traced(**changes: Any) -> LayerGraph:
    given: dict[str, Any] = {"example_batch": own.vectors, "loss_fn": own.square, **changes}
    build = given.pop("build", _Base)
    return trace(model_from_functions(build, given.pop("example_batch"), **given)).layer_graph(2)


def _raise(_: int) -> own.Batch:
    raise KeyError("no data")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"example_batch": lambda b: {"x": torch.ones(b, 8), "y": torch.ones(4, b)}}, "'y'"),
        ({"example_batch": lambda b: {"x": torch.ones(b, 8), "y": 3}}, "int"),
        ({"example_batch": lambda _: [1]}, "list"),
        ({"example_batch": _raise}, "no data"),
        ({"build": lambda: 3}, "int"),
        ({"build": lambda: nn.Linear(-1, 2)}, "build_model"),
        ({"loss_fn": lambda output, _: output}, "(2, 4)"),
        ({"loss_fn": lambda output, _: output.mean().item()}, "failed"),
        ({"loss_fn": None}, "loss_fn"),
    ],
)
def test_broken_contract(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(LgaError) as raised:
        _traced(**changes)
    assert word in str(raised.value)
    assert raised.value.hint


def test_tracing_leaves_the_model_alone() -> None:
    model = _Base()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trace(model_from_functions(model, own.vectors, loss_fn=own.square)).layer_graph(4)
    assert torch.equal(torch.rand(1), expected)
    assert not model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert type(model(torch.ones(1, 8))) is torch.Tensor


def test_cache_is_explained() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(TraceError) as raised:
        trace(
            model_from_functions(
                lambda: transformers.LlamaForCausalLM(config),
                lambda b: {"input_ids": torch.ones(b, 4, dtype=torch.long)},
                loss_fn=lambda output, _: output.logits.mean(),
            )
        )
    assert "model.layers.0" in raised.value.message
    assert "use_cache" in raised.value.hint
