"""A small residual network for images, with BatchNorm and rectifiers that work in place.

BatchNorm keeps running statistics: they must move once per micro-batch, recompute or not. It also
makes the loss of a micro-batch depend on its other samples, so a step equals plain accumulation
over the same micro-batches, not one large batch. The images are made, not read: each class is a
fixed pattern under noise.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

IMAGE_SIZE = 32
NUM_CHANNELS = 3
NUM_CLASSES = 10
WIDTHS = (16, 16, 32, 64)
"""Channels of each group; every group after the first halves the image."""
NUM_BLOCKS_PER_GROUP = 3
NUM_IMAGES = 4096
LEARNING_RATE = 1e-3


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a projection where the shape changes."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(num_outputs)
        self.second = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(num_outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False),
                nn.BatchNorm2d(num_outputs),
            )

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.relu(self.first_norm(self.first(hidden)))
        inner = self.second_norm(self.second(inner))
        output: Tensor = self.relu(inner + self.shortcut(hidden))
        return output


class ResNet(nn.Module):
    """A convolutional stem, groups of residual blocks, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(NUM_CHANNELS, WIDTHS[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        num_inputs = WIDTHS[0]
        for group, num_outputs in enumerate(WIDTHS):
            for index in range(NUM_BLOCKS_PER_GROUP):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(ResidualBlock(num_inputs, num_outputs, stride))
                num_inputs = num_outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_inputs, NUM_CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits


class NoisyPatterns(Dataset[dict[str, Tensor]]):
    """Image i: the pattern of class i mod NUM_CLASSES, plus noise drawn from i alone."""

    def __init__(self) -> None:
        self.patterns = torch.randn(
            NUM_CLASSES,
            NUM_CHANNELS,
            IMAGE_SIZE,
            IMAGE_SIZE,
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < NUM_IMAGES:
            raise IndexError(f"image {index} of {NUM_IMAGES}")
        label = index % NUM_CLASSES
        noise = torch.randn(
            self.patterns[label].shape, generator=torch.Generator().manual_seed(index + 1)
        )
        return {"images": 0.5 * self.patterns[label] + noise, "labels": torch.tensor(label)}


def build_model() -> nn.Module:
    """The model, with fresh weights on the current default device."""
    return ResNet()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    """Random images and labels in the form of a batch."""
    return {
        "images": torch.randn(batch_size, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE),
        "labels": torch.randint(NUM_CLASSES, (batch_size,)),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy per image, in nats."""
    return F.cross_entropy(output, batch["labels"])


def build_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at a constant learning rate."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)


def build_dataset() -> Dataset[dict[str, Tensor]]:
    """NUM_IMAGES images, the same on every machine."""
    return NoisyPatterns()
