"""Model files: the contract, its errors without tracebacks, and the model's fingerprint."""

import copy
from pathlib import Path

import pytest
import torch
from models import own
from torch import nn

from planner.errors import ModelFileError
from planner.model_file import fingerprint, forward_keys, load_model_file
from planner.trace import trace

_GOOD = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

def example_batch(batch_size):
    return {"input": torch.ones(batch_size, 4)}

def loss_fn(output, batch):
    return output.mean()
"""


def _write(folder: Path, text: str, name: str = "model.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_loads_a_path(tmp_path: Path) -> None:
    loaded = load_model_file(_write(tmp_path, _GOOD))
    assert loaded.name == "model"
    assert loaded.loss_fn is not None
    assert loaded.build_optimizer is None
    assert len(trace(loaded).layer_graph(3).layers) == 2


def test_loads_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, _GOOD, "some_lga_model.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model_file("some_lga_model").name == "some_lga_model"


def test_neighbours_can_be_imported(tmp_path: Path) -> None:
    _write(tmp_path, "WIDTH = 4\n", "lga_neighbour.py")
    loaded = load_model_file(_write(tmp_path, "from lga_neighbour import WIDTH\n" + _GOOD))
    assert loaded.example_batch(1)["input"].shape == (1, 4)


def test_layers_of_modules(tmp_path: Path) -> None:
    text = _GOOD.replace(
        "def build_model():", "layers = [nn.Linear(4, 4), nn.ReLU()]\ndef other():"
    )
    loaded = load_model_file(_write(tmp_path, text))
    assert loaded.layers == ("0", "1")
    one, two = loaded.build_model(), loaded.build_model()
    assert torch.equal(next(one.parameters()), next(two.parameters()))
    assert next(one.parameters()) is not next(two.parameters())
    assert [layer.name for layer in trace(loaded).layer_graph(2).layers] == ["0"]


def test_layers_of_paths(tmp_path: Path) -> None:
    loaded = load_model_file(_write(tmp_path, _GOOD + "layers = ['1', '0']\n".replace("'1', ", "")))
    assert loaded.layers == ("0",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", ("not valid Python", "line 1", "def f(:")),
        ("import torch\n1 / 0\n", ("ZeroDivisionError", "line 2", "1 / 0")),
        ("import lga_missing_module\n", ("ModuleNotFoundError", "line 1")),
        ("raise SystemExit(3)\n", ("SystemExit",)),
        (_GOOD.replace("build_model", "build_modle"), ("build_model", "did you mean build_modle")),
        (_GOOD.replace("def example_batch", "def batches"), ("example_batch", "def example_batch")),
        (_GOOD + "loss_fn = 3\n", ("loss_fn is 3",)),
        (_GOOD + "layers = 'all'\n", ("layers is 'all'",)),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ModelFileError) as raised:
        load_model_file(_write(tmp_path, text))
    for word in words:
        assert word in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None or raised.value.__suppress_context__


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    _write(tmp_path, _GOOD)
    with pytest.raises(ModelFileError, match=r"did you mean .*model\.py"):
        load_model_file(str(tmp_path / "modle.py"))
    with pytest.raises(ModelFileError, match="no module"):
        load_model_file("lga_no_such_package.model")


def test_forward_keys() -> None:
    class Takes(nn.Module):
        def forward(self, b: int, *, a: int = 0, **others: int) -> None: ...

    assert forward_keys(Takes(), {"a": 1, "others": 2, "b": 3, "c": 4}) == ("a", "b")


def test_fingerprint_is_equal_on_meta() -> None:
    for build in (own.Mlp, own.ConvNet, own.Tied, own.ClassToken):
        with torch.device("meta"):
            on_meta = build()
        assert fingerprint(on_meta) == fingerprint(build())
        assert len(fingerprint(on_meta)) == 32


def test_fingerprint_sees_the_structure_and_not_the_values() -> None:
    model = own.ClassToken()
    original = fingerprint(model)
    with torch.no_grad():
        model.token += 1
    assert fingerprint(model.eval()) == original
    changed = copy.deepcopy(model)
    changed.token.requires_grad_(False)
    assert fingerprint(changed) != original
    tied = copy.deepcopy(model)
    tied.blocks[1].weight = tied.blocks[0].weight
    assert fingerprint(tied) != original
    assert fingerprint(model.double()) != original


def test_fingerprint_sees_forward_but_not_its_comments(tmp_path: Path) -> None:
    base = """
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
    def forward(self, x):
        return self.linear(x)
def build_model():
    return Model()
def example_batch(batch_size):
    return {}
"""
    documented = base.replace("x):\n", 'x):\n        """Words."""\n        # a comment\n')
    other = base.replace("self.linear(x)", "self.linear(x) * 2")
    prints = [
        fingerprint(load_model_file(_write(tmp_path, text, f"m{i}.py")).build_model())
        for i, text in enumerate((base, documented, other))
    ]
    assert prints[0] == prints[1] != prints[2]
