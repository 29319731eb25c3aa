"""Mistral: a sliding window shorter than the sequence, grouped-query attention."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, use_cache=False,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
