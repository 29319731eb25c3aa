"""LLaMA with 405 billion parameters in bfloat16, for planning only: no weights are ever made."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEQUENCE_LENGTH = 4096


def build_model() -> nn.Module:
    """126 blocks of width 16384 with grouped-query attention, 405.9 billion parameters."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE_LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, 128256, (batch_size, SEQUENCE_LENGTH))
    return {"input_ids": tokens, "targets": tokens}


def loss_fn(output: object, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token."""
    logits = output.logits[:, :-1]  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten())
