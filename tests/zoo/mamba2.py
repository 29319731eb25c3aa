"""Mamba-2: a state-space model computed in chunks of matrix products."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=4, num_heads=4,
        head_dim=8, n_groups=1, chunk_size=4, use_cache=False,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
