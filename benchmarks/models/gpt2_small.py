"""GPT-2 small of transformers with random weights: 124 M parameters, tied embeddings, dropout."""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

SEQUENCE_LENGTH = 1024


def build_model() -> nn.Module:
    """GPT-2 small; the key-value cache is of no use in training."""
    return GPT2LMHeadModel(GPT2Config(use_cache=False))


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, 50257, (batch_size, SEQUENCE_LENGTH))
    return {"input_ids": tokens, "targets": tokens}


def loss_fn(output: object, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token."""
    logits = output.logits[:, :-1]  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten())
