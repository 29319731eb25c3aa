"""What a module inside a layer leaves behind, in a hook or an attribute, and the model reads."""

import pytest
import torch
from planned import assert_same, model_of, plan_of, traced
from torch import Tensor, nn

from planner.errors import TraceError


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        return scores, scores.softmax(-1)


class Block(nn.Module):
    """A mixture of two linear layers; the router's scores are seen by nobody but a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mixture = nn.Module()
        self.mixture.router = Router()
        self.mixture.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.mean = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        _, weights = self.mixture.router(normal)
        mixed = [expert(normal) for expert in self.mixture.experts]
        self.mean = weights.mean(0).square().sum()
        return x + (torch.stack(mixed, -1) * weights[:, None]).sum(-1)


class Balanced(nn.Module):
    """Its loss adds what hooks have seen, as an auxiliary loss does."""

    def __init__(self, attribute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.attribute = attribute
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hooks = [
            block.mixture.router.register_forward_hook(lambda *call: seen.append(call[2][0]))
            for block in self.blocks
        ]
        for block in self.blocks:
            x = block(x)
        for hook in hooks:
            hook.remove()
        if self.attribute:
            seen = [block.mean for block in self.blocks]
        balance = torch.stack([scores.square().mean() for scores in seen]).mean()
        return self.head(x), balance


def loss_fn(output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (output[0] - batch["y"]).square().mean() + output[1]


def test_a_module_whose_result_a_hook_keeps_is_a_layer() -> None:
    model = model_of(Balanced, loss_fn)
    names = [layer.name for layer in traced(model).layer_graph(2).layers]
    block = ["norm", "mixture.router", "mixture.experts.0", "mixture.experts.1"]
    assert names == [f"blocks.{i}.{name}" for i in range(3) for name in block] + ["head"]
    assert_same(model, plan_of(model, (0, 3, 6, 10, 13), num_pipeline_ranks=4), 0.0)


def test_an_attribute_is_refused() -> None:
    with pytest.raises(TraceError, match="neither a parameter nor a buffer") as caught:
        traced(model_of(lambda: Balanced(attribute=True), loss_fn))
    assert "scores.square().mean() for scores in seen" in str(caught.value)
    assert "return it from the layer that makes it" in caught.value.hint
