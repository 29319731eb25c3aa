"""GPT-2 XL of transformers with random weights: 1.6 billion parameters, tied embeddings."""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

SEQUENCE_LENGTH = 1024


def build_model() -> nn.Module:
    """48 blocks of width 1600; the key-value cache is of no use in training."""
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25, use_cache=False)
    return GPT2LMHeadModel(config).to(torch.bfloat16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, 50257, (batch_size, SEQUENCE_LENGTH))
    return {"input_ids": tokens, "targets": tokens}


def loss_fn(output: object, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token."""
    logits = output.logits[:, :-1]  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten())
