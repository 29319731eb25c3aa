"""Models that lga-plan cannot trace: it names the module, the line, and a way out."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.cli.plan import main as lga_plan

HEAD = """\
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class State:
    x: torch.Tensor

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()
    @staticmethod
    def backward(ctx, gradient):
        return gradient

def example_batch(batch_size):
    return {"x": torch.randn(batch_size, 4)}

def loss_fn(output, batch):
    return output.square().mean()

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = torch.arange(4.0)
    def forward(self, x, *more):
        %s

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.table = torch.arange(4.0)
    def forward(self, x):
        for block in self.blocks:
            %s
        return x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 4)
    def forward(self, x):
        hidden = self.head(self.encoder(x))
        return %s

def build_model():
    return %s
"""
PLAIN = ("return self.linear(x)", "x = block(x)", "hidden", "Model()")
BLOCK, BETWEEN, RETURN, BUILD = range(4)
VALUES = ("reads tensor values", "torch.where")


def plan(folder: Path, where: int, text: str) -> Result:
    parts = list(PLAIN)
    parts[where] = text
    (folder / "model.py").write_text(HEAD % tuple(parts))
    (folder / "cluster.yaml").write_text(
        "name: two processes\n"
        "hosts:\n"
        "  - {device: v100-32, count: 2}\n"
        "network: loopback\n"
        "backend: gloo\n"
    )
    words = ("--gpus", "2", "--pipeline-ranks", "2", "--batch-size", "4", "--time-limit", "2")
    files = ("--cluster", str(folder / "cluster.yaml"), "--output", str(folder / "a.plan.yaml"))
    return CliRunner().invoke(lga_plan, [str(folder / "model.py"), *words, *files])


@pytest.mark.parametrize(
    ("where", "text", "words"),
    [
        (
            BLOCK,
            "return self.linear(x) if x.mean() > 0 else x",
            ("in module 'encoder.blocks.0'", "line 29", "if x.mean() > 0", *VALUES),
        ),
        (BLOCK, "return self.linear(x) * x.max().item()", ("blocks.0'", "line 29", *VALUES)),
        (BLOCK, "return self.linear(x)[x[:, 0] > 0]", ("blocks.0'", "line 29", *VALUES)),
        (
            BETWEEN,
            "x = block(x) if x.mean() > 0 else x",
            ("between the layers of module 'encoder'", "line 38", *VALUES),
        ),
        (BETWEEN, "x = block(x) * x.max().item()", ("'encoder'", "line 38", *VALUES)),
        (BETWEEN, "x = block(x) + sum(x[0].tolist())", ("'encoder'", "line 38", *VALUES)),
        (BETWEEN, "assert x.isfinite().all(); x = block(x)", ("'encoder'", "line 38", *VALUES)),
        (BETWEEN, "x = Straight.apply(block(x))", ("Straight", "line 38", "of its own")),
        (BETWEEN, "x = block(x, State(x))", ("blocks.0'", "type State", "line 38", "tuples")),
        (BETWEEN, "x = block(x, {1, 2})", ("blocks.0'", "type set", "line 38", "tuples")),
        (BETWEEN, "x = block(x) + self.table", ("(4,)", "line 38", "register_buffer")),
        (BETWEEN, "x += 1; x = block(x)", ("batch's 'x' in place", "line 38", "x = x + 1")),
        (
            BETWEEN,
            'with torch.autocast("cpu"): x = block(x)',
            ("autocast", "line 38", "inside the layers"),
        ),
        (BETWEEN, "x = torch.func.vmap(block)(x)", ("(4,)", "line 38", "of its own")),
        (RETURN, "State(hidden)", ("forward of Model returns", "type State", "dicts")),
        (RETURN, "{'step': 3}", ("forward of Model returns 3, and no tensor", "loss_fn")),
        pytest.param(
            BUILD,
            "torch.compile(Model())",
            ("cannot be traced", "torch.compile out of"),
            marks=pytest.mark.filterwarnings("ignore"),
        ),
    ],
)
def test_refused_in_words(tmp_path: Path, where: int, text: str, words: tuple[str, ...]) -> None:
    result = plan(tmp_path, where, text)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert not (tmp_path / "a.plan.yaml").exists()
    for word in ("error: ", "try: ", *words):
        assert word in result.stderr
    assert "site-packages" not in result.stderr


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (BETWEEN, "print(tuple(x.shape), x.dim(), len(x)); x = block(x)"),
        (BLOCK, "print(x.shape, x.dtype); return self.linear(x)"),
        (BLOCK, "return Straight.apply(self.linear(x))"),
        (BLOCK, 'with torch.autocast("cpu"): return self.linear(x).float()'),
        (BETWEEN, "x = block(x, {'a': (x, 1)}, [None, 'b'], torch.float32)"),
    ],
)
def test_planned(tmp_path: Path, where: int, text: str) -> None:
    result = plan(tmp_path, where, text)
    assert result.exit_code == 0, result.output
