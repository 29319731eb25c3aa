"""T5: encoder and decoder share an embedding; the decoder's input is made of the labels."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH, TARGET_LENGTH, NUM_PADDED = 64, 8, 6, 2


def build_model() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (batch_size, LENGTH))
    mask = torch.ones_like(tokens)
    mask[:, -NUM_PADDED:] = 0
    labels = torch.randint(1, VOCABULARY, (batch_size, TARGET_LENGTH))
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}
