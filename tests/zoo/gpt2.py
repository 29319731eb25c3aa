"""GPT-2 as its users train it: labels go in, the loss comes out, with dropout and a tied weight."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 8


def build_model() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=4, n_head=2, use_cache=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    return {"input_ids": tokens, "labels": tokens.clone()}
