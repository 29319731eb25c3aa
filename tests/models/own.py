"""Small models of our own, each odd in one way."""

import torch
from torch import nn
from torch.nn import functional

Batch = dict[str, torch.Tensor]


def vectors(batch_size: int) -> Batch:
    return {"x": torch.randn(batch_size, 8), "y": torch.randn(batch_size, 4)}


def images(batch_size: int) -> Batch:
    return {"x": torch.randn(batch_size, 3, 8, 8), "y": torch.randint(4, (batch_size,))}


def tokens(batch_size: int) -> Batch:
    return {"x": torch.randint(16, (batch_size, 6)), "y": torch.randint(16, (batch_size, 6))}


def square(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return functional.mse_loss(output, batch["y"])


def classes(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, -2), batch["y"].flatten())


class Mlp(nn.Module):
    """A Sequential with dropout inside a module of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Tanh(),
            nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class ConvNet(nn.Module):
    """Batch normalisation, and ReLU in place at the start of a layer's glue."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.blocks = nn.ModuleList(_Residual(4) for _ in range(3))
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.body(x)
        out += x
        return self.act(out)


class StartsInPlace(nn.Module):
    """Its second layer changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), _InPlace(), nn.Linear(8, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0)
        return self.linear(x)


class UNet(nn.Module):
    """Long skips: what the first layer makes, the last one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)])
        self.up = nn.ModuleList([nn.Linear(3, 5), nn.Linear(10, 6), nn.Linear(12, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = functional.gelu(layer(x))
            skips.append(x)
        skips.pop()
        for layer in self.up[:-1]:
            x = torch.cat([functional.relu(layer(x)), skips.pop()], dim=-1)
        return self.up[-1](x)


class Tied(nn.Module):
    """The head reads the embedding's weight, through glue; attention masks are made from glue."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        hidden = self.encoder(self.embed(x), mask=mask, is_causal=True)
        return functional.linear(hidden, self.embed.weight)


class ClassToken(nn.Module):
    """Parameters, a buffer and dropout in glue."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.dropout(x, 0.3, training=self.training)
        hidden = torch.cat([self.token.expand(len(x), -1, -1), x.unsqueeze(1)], dim=1)
        for block in self.blocks:
            hidden = hidden + block(hidden) * self.scale + self.shift
        return self.head(hidden[:, 0])


class Frozen(nn.Module):
    """A frozen first block, a block under no_grad, an unused module and an unused output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
        self.second = nn.Linear(8, 8)
        self.third = _TwoOutputs()
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.no_grad():
            x = functional.relu(self.second(x))
        x, _ = self.third(x)
        return self.head(x)


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.two(x)


class Shared(nn.Module):
    """One module called twice; a nested structure of tensors between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _Nested()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"x": self.layers[0](x), "extra": [x, (x * 2,)]}
        state = self.block(state)
        state = self.block(state, scale=0.5)
        return {"out": self.layers[1](state["x"])}


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state: dict, *, scale: float = 1.0) -> dict:  # type: ignore[type-arg]
        first, (second,) = state["extra"]
        return {"x": self.linear(state["x"] + second) * scale, "extra": [first, (first + 1,)]}


class Deep(nn.Module):
    """All of it in one child: must be cut one level deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


class Views(nn.Module):
    """Writes into slices in glue: an in-place change that no value returned shows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = x.new_zeros(x.shape)
        table[:, 2:4] = x[:, :2]
        hidden = self.one(x + table)
        room = torch.zeros_like(hidden)
        room[:, :4] = hidden[:, 4:] * 3
        return self.two(room + hidden)
