"""Bottleneck residual blocks with BatchNorm; rectifiers work in place, pooling stands between."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, NUM_CLASSES = 8, 5


class Bottleneck(nn.Module):
    """A narrow 3 x 3 convolution between two 1 x 1, beside a shortcut."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        narrow = num_outputs // 2
        self.body = nn.Sequential(
            nn.Conv2d(num_inputs, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, num_outputs, 1, bias=False),
            nn.BatchNorm2d(num_outputs),
        )
        self.shortcut = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.body(hidden)
        output += self.shortcut(hidden)
        return self.relu(output)


class ResNet(nn.Module):
    """Stem, pooling, groups of blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.layer1 = nn.Sequential(Bottleneck(WIDTH, WIDTH, 1), Bottleneck(WIDTH, WIDTH, 1))
        self.layer2 = nn.Sequential(Bottleneck(WIDTH, 16, 2), Bottleneck(16, 16, 1))
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)), inplace=True)
        hidden = F.max_pool2d(hidden, 3, stride=2, padding=1)
        hidden = self.layer2(self.layer1(hidden))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(hidden, 1), 1))


def build_model() -> nn.Module:
    return ResNet()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "images": torch.randn(batch_size, 3, 12, 12),
        "labels": torch.randint(NUM_CLASSES, (batch_size,)),
    }


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch["labels"])
