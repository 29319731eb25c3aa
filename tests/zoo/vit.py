"""ViT: a transformer on patches of images, with a loss function of its own."""

import torch
import transformers
from torch import Tensor, nn

IMAGE_SIZE, NUM_CLASSES = 16, 5


def build_model() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        image_size=IMAGE_SIZE, patch_size=8, num_labels=NUM_CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "classes": torch.randint(NUM_CLASSES, (batch_size,)),
    }


def loss_fn(output: transformers.utils.ModelOutput, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output.logits, batch["classes"])
