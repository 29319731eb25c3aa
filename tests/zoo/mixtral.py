"""Mixtral: a mixture of experts, whose routing of tokens depends on their values."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
