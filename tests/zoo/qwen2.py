"""Qwen2 with tied embeddings, on padded sequences: an attention mask, and labels of -100."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH, NUM_PADDED = 64, 8, 2


def build_model() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH))
    mask = torch.ones_like(tokens)
    mask[:, -NUM_PADDED:] = 0  # as many in every sample: the loss is the mean of samples
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
