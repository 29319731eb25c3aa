"""BERT for masked words: padded sequences of two segments, a few words masked in each."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH, NUM_MASKED, NUM_PADDED, MASK_TOKEN = 64, 12, 3, 2, 3


def build_model() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (batch_size, LENGTH))
    mask = torch.ones_like(tokens)
    mask[:, -NUM_PADDED:] = 0
    segments = torch.zeros_like(tokens)
    segments[:, LENGTH // 2 :] = 1
    labels = torch.full_like(tokens, -100)
    labels[:, :NUM_MASKED] = tokens[:, :NUM_MASKED]
    tokens[:, :NUM_MASKED] = MASK_TOKEN
    return {
        "input_ids": tokens, "attention_mask": mask, "token_type_ids": segments, "labels": labels
    }  # fmt: skip
