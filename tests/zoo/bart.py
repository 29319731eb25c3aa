"""BART: encoder and decoder with dropout, learnt positions and padded sources."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH, TARGET_LENGTH, NUM_PADDED = 64, 8, 6, 2


def build_model() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, d_model=16, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (batch_size, LENGTH))
    mask = torch.ones_like(tokens)
    mask[:, -NUM_PADDED:] = 0
    labels = torch.randint(4, VOCABULARY, (batch_size, TARGET_LENGTH))
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
