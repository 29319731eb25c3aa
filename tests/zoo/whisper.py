"""Whisper: an encoder of spectrograms by convolution and attention, a decoder of words."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, NUM_BANDS, NUM_FRAMES, TARGET_LENGTH = 64, 8, 16, 6


def build_model() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=NUM_BANDS, d_model=16, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=NUM_FRAMES // 2,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, use_cache=False,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(batch_size, NUM_BANDS, NUM_FRAMES),
        "labels": torch.randint(4, VOCABULARY, (batch_size, TARGET_LENGTH)),
    }
