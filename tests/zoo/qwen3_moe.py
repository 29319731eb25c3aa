"""Qwen3-MoE: normalised queries and keys, many small experts, an auxiliary loss of the router."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
        num_experts=8, num_experts_per_tok=2, output_router_logits=True, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
