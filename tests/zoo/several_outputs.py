"""Several inputs, and outputs in a dict and a tuple, all of which the loss reads."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, NUM_CLASSES = 8, 4


class Fuse(nn.Module):
    """Takes two tensors in a dict, and gives two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate(torch.cat([parts["image"], parts["text"]], dim=-1)))
        return gate * parts["image"], (1 - gate) * parts["text"]


class Heads(nn.Module):
    """A class, a box, and an embedding that nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.box = nn.Linear(WIDTH, NUM_CLASSES), nn.Linear(WIDTH, 4)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"classes": self.classes(hidden), "box": self.box(hidden).sigmoid()}


class SeveralOutputs(nn.Module):
    """Two encoders, fusion, two heads and an auxiliary output of the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, WIDTH), nn.ReLU())
        self.text = nn.EmbeddingBag(20, WIDTH, mode="sum")
        self.fuse = nn.ModuleList([Fuse() for _ in range(3)])
        self.auxiliary = nn.Linear(WIDTH, NUM_CLASSES)
        self.heads = Heads()

    def forward(
        self, image: Tensor, text: Tensor, weight: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        hidden = self.image(image), self.text(text)
        middle = hidden[0]
        for index, fuse in enumerate(self.fuse):
            hidden = fuse({"image": hidden[0], "text": hidden[1]})
            if index == 1:
                middle = hidden[0] + hidden[1]
        outputs = self.heads(hidden[0] + hidden[1])
        if weight is not None:
            outputs["classes"] = outputs["classes"] * weight[:, None]
        return {**outputs, "hidden": hidden[1].detach()}, self.auxiliary(middle)


def build_model() -> nn.Module:
    return SeveralOutputs()


def example_batch(batch_size: int) -> dict[str, Tensor]:
    return {
        "image": torch.randn(batch_size, 12),
        "text": torch.randint(20, (batch_size, 3)),
        "weight": torch.rand(batch_size),
        "label": torch.randint(NUM_CLASSES, (batch_size,)),
        "box": torch.rand(batch_size, 4),
    }


def loss_fn(output: tuple[dict[str, Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
    heads, auxiliary = output
    label = batch["label"]
    loss = F.cross_entropy(heads["classes"], label) + 0.3 * F.cross_entropy(auxiliary, label)
    return loss + F.smooth_l1_loss(heads["box"], batch["box"])
