"""A byte-level GPT that learns to write Python, small enough to train on two CPU cores.

Input and output embeddings are tied, so a plan that puts them on different pipeline ranks must add
their gradients. Dropout acts on the embedding and on both residual branches of every block. The
text is the standard library of the Python that runs it: hosts that train together need the same
Python version. This file knows nothing of plans, ranks or micro-batches.
"""

import math
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

VOCABULARY_SIZE = 256
CONTEXT = 64
WIDTH = 128
NUM_HEADS = 4
NUM_BLOCKS = 10
DROPOUT = 0.1
CORPUS_BYTES = 2_000_000
LEARNING_RATE = 1e-3
NUM_WARM_UP_STEPS = 5
NUM_DECAY_STEPS = 1000
"""Steps after which the learning rate stays at a tenth of its peak."""


class Attention(nn.Module):
    """Causal self-attention: every position reads itself and what stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.query_key_value(hidden).unflatten(-1, (3, NUM_HEADS, WIDTH // NUM_HEADS))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each normalised first and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        output: Tensor = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return output


class GPT(nn.Module):
    """Token and position embeddings, blocks, and a head that shares the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY_SIZE, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY_SIZE, bias=False)
        self.apply(_initialise)
        for name, weight in self.blocks.named_parameters():
            # Unscaled, the branches add up to one direction that all tokens share; when its sign
            # flips, the loss doubles for a step.
            if name.endswith(("attention.projection.weight", "mlp.2.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * NUM_BLOCKS))
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.dropout(self.wte(input_ids) + self.wpe(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a text; the targets are the inputs moved by one byte."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return {"input_ids": window[:-1], "targets": window[1:]}


def build_model() -> nn.Module:
    """The model, with fresh weights on the current default device."""
    return GPT()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random bytes in the form of a batch."""
    tokens = torch.randint(VOCABULARY_SIZE, (batch_size, CONTEXT + 1))
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy per byte, in nats; every sample has as many bytes as the next."""
    return F.cross_entropy(output.flatten(0, 1), batch["targets"].flatten())


def build_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; the scheduler below moves its learning rate."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def build_scheduler(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    return LambdaLR(optimizer, _learning_rate_factor)


def _learning_rate_factor(step: int) -> float:
    if step < NUM_WARM_UP_STEPS:
        return (step + 1) / NUM_WARM_UP_STEPS
    progress = min(1.0, (step - NUM_WARM_UP_STEPS) / NUM_DECAY_STEPS)
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_dataset() -> Dataset[dict[str, Tensor]]:
    """Windows over the public top-level modules of Python's standard library, alphabetically.

    Modules with a leading underscore are left out: `_sysconfigdata` differs between machines.
    """
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    return ByteWindows(bytes(text[:CORPUS_BYTES]))
