"""T5 with 11 billion parameters in bfloat16, for planning only: no weights are ever made."""

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

SOURCE_LENGTH, TARGET_LENGTH, VOCABULARY = 512, 512, 32128


def build_model() -> nn.Module:
    """24 blocks of encoder and of decoder with wide layers in between, 11.3 billion parameters."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=1024,
        d_kv=128,
        d_ff=65536,
        num_layers=24,
        num_heads=128,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(torch.bfloat16)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random tokens."""
    return {
        "input_ids": torch.randint(0, VOCABULARY, (batch_size, SOURCE_LENGTH)),
        "labels": torch.randint(0, VOCABULARY, (batch_size, TARGET_LENGTH)),
    }
