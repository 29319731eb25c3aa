"""Mixtral 8x7B in bfloat16, for planning only: no weights are ever made."""

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

SEQUENCE_LENGTH, VOCABULARY = 4096, 32000


def build_model() -> nn.Module:
    """32 blocks with 8 experts each, of which a token visits 2; 46.7 billion parameters."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=SEQUENCE_LENGTH,
        use_cache=False,
    )
    return MixtralForCausalLM(config).to(torch.bfloat16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random tokens."""
    tokens = torch.randint(0, VOCABULARY, (batch_size, SEQUENCE_LENGTH))
    return {"input_ids": tokens, "targets": tokens}


def loss_fn(output: object, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token."""
    logits = output.logits[:, :-1]  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten())
