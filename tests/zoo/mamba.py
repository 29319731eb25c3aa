"""Mamba: a state-space model, whose recurrence is a loop over the sequence without its kernels."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=4, use_cache=False
    )
    return transformers.MambaForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
