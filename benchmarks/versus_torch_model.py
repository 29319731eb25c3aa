"""The model that versus_torch trains: a GPT as a chain of layers, which any contender may cut.

It has no dropout and ties no weights: torch's own pipeline can do neither as one process does. This
file knows nothing of plans, ranks or micro-batches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from planner.model_file import ModelFile

__all__ = ["Sizes", "loss_fn", "model_file", "optimizer", "seeded_layers"]

VOCABULARY_SIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the model, and of its batch."""

    num_blocks: int = 8
    width: int = 256
    head_width: int = 32
    """Of an attention head."""
    context: int = 64
    """Tokens in a sample."""
    global_batch_size: int = 16
    """Samples in a step."""
    micro_batch_size: int = 2
    is_fused: bool = False
    """Whether AdamW updates in one kernel; else in torch's default way."""

    @property
    def num_layers(self) -> int:
        """Of the chain: the embedding, the blocks and the head."""
        return self.num_blocks + 2


class Embedding(nn.Module):
    """Of tokens and positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY_SIZE, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        output: Tensor = self.tokens(tokens) + self.positions(positions)
        return output


class Block(nn.Module):
    """Causal attention and a perceptron, each normalised first and added to its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.head_width = sizes.width, sizes.head_width
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(hidden))
        heads = heads.unflatten(-1, (3, -1, self.head_width))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(mixed.transpose(1, 2).flatten(2))
        output: Tensor = hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return output


class Head(nn.Module):
    """Scores of the next token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.width)
        self.scores = nn.Linear(sizes.width, VOCABULARY_SIZE, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.scores(self.norm(hidden))
        return output


class Chain(nn.Module):
    """Consecutive layers of the model, under the names that they have in the whole one."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, tokens: Tensor) -> Tensor:
        value = tokens
        for layer in self.children():
            value = layer(value)
        return value


def seeded_layers(sizes: Sizes, first: int = 0, end: int | None = None) -> Chain:
    """`layers_of` with the weights that the whole model always has."""
    torch.manual_seed(0)
    return layers_of(sizes, first, end)


def layers_of(sizes: Sizes, first: int = 0, end: int | None = None) -> Chain:
    """Layers first .. end - 1 of the chain (all by default), freshly initialised."""
    made = [Embedding(sizes), *(Block(sizes) for _ in range(sizes.num_blocks)), Head(sizes)]
    names = [f"layer_{index}" for index in range(len(made))]
    return Chain(dict(list(zip(names, made, strict=True))[first:end]))


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per token, in nats."""
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def model_file(sizes: Sizes) -> ModelFile:
    """The same model by the contract of lga-plan."""

    def example_batch(batch_size: int) -> dict[str, Tensor]:
        tokens = torch.randint(VOCABULARY_SIZE, (batch_size, sizes.context + 1))
        return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    return ModelFile(
        name="gpt",
        path="",
        build_model=lambda: layers_of(sizes),
        example_batch=example_batch,
        loss_fn=lambda output, batch: loss_fn(output, batch["targets"]),
        build_optimizer=lambda parameters: optimizer(sizes, parameters),
    )


def optimizer(sizes: Sizes, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that every contender trains with."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=sizes.is_fused or None)
