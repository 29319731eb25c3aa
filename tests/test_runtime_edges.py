"""Models made to find where a planned run differs from plain accumulation."""

import itertools

import pytest
import torch
from planned import Chain, Layer, assert_same, model_of, plan_of, vectors
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def test_gradient_of_a_double_loss_starts_as_a_double() -> None:
    def double(batch_size: int) -> dict[str, Tensor]:
        return {key: value.double() for key, value in vectors(batch_size).items()}

    model_file = model_of(lambda: Chain(lambda: nn.Linear(8, 8)).double(), batch=double)
    assert_same(model_file, plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2))


class Skip(Chain):
    """Every layer reads the first one's output."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = layer(torch.tanh(x)) + first
        output: Tensor = self.head(x)
        return output


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("num_pipeline_ranks", [1, 2, 3])
def test_a_skip_that_every_stage_reads(
    num_pipeline_ranks: int, num_micro_batches: int, recompute: bool
) -> None:
    model_file = model_of(lambda: Skip(lambda: nn.Linear(8, 8), 6))
    plan = plan_of(
        model_file,
        (0, 1, 2, 3, 4, 5, 7),
        num_pipeline_ranks=num_pipeline_ranks,
        num_micro_batches=num_micro_batches,
        recompute=recompute,
    )
    assert_same(model_file, plan)


class Table(nn.Module):
    """Gives a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)]


class WithTable(Chain):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(8, 8))
        self.position = Table()

    def forward(self, x: Tensor) -> Tensor:
        position = self.position(x)
        for layer in self.layers:
            x = torch.tanh(layer(x) + position)
        output: Tensor = self.head(x * position)
        return output


@pytest.mark.parametrize("num_weight_buffers", [1, 2, 3])
@pytest.mark.parametrize("num_pipeline_ranks", [1, 2])
def test_an_output_that_is_a_view_of_weights_survives_the_next_gather(
    num_pipeline_ranks: int, num_weight_buffers: int
) -> None:
    model_file = model_of(WithTable)
    plan = plan_of(
        model_file,
        (0, 2, 3, 4, 6),
        num_replicas=2,
        num_pipeline_ranks=num_pipeline_ranks,
        num_weight_buffers=num_weight_buffers,
    )
    assert_same(model_file, plan, tolerance=1e-6)


class ComplexWeight(nn.Module):
    """Its backward saves a conjugated complex view of a real weight; gives a strided view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight).conj()
        return torch.fft.ifft(torch.fft.fft(x) @ weight).real


def test_complex_views_of_weights() -> None:
    model_file = model_of(lambda: Chain(ComplexWeight))
    assert_same(model_file, plan_of(model_file, (0, 1, 2, 3, 5), num_pipeline_ranks=2))
    for num_weight_buffers in (1, 2):
        plan = plan_of(
            model_file,
            (0, 1, 2, 3, 5),
            num_replicas=2,
            num_weight_buffers=num_weight_buffers,
        )
        assert_same(model_file, plan, tolerance=1e-6)


class Average(nn.Module):
    """Reads a buffer that it changes at every call, and gives a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)  # type: ignore[union-attr, operator]
        product: Tensor = self.linear(x) * self.mean.clone()  # type: ignore[operator]
        return product


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("build", [Average, lambda: nn.utils.spectral_norm(nn.Linear(8, 8))])
def test_a_recomputed_forward_reads_the_buffers_of_the_first(build: Layer, recompute: bool) -> None:
    model_file = model_of(lambda: Chain(build))
    plan = plan_of(model_file, (0, 2, 3, 5), num_pipeline_ranks=2, recompute=recompute)
    assert_same(model_file, plan)


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.calls.add_(1)  # type: ignore[operator]
        return self.linear(x), self.calls  # type: ignore[return-value]


class Counted(Chain):
    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            x, calls = layer(x)
            found.append(calls)
        output: Tensor = self.head(x)
        return output * sum(found)[:4]  # type: ignore[index]


@pytest.mark.parametrize("recompute", [False, True])
def test_an_output_that_is_a_buffer_keeps_its_value(recompute: bool) -> None:
    model_file = model_of(lambda: Counted(Count))
    plan = plan_of(model_file, (0, 1, 3, 5), num_pipeline_ranks=2, recompute=recompute)
    assert_same(model_file, plan)


class LearnedMask(nn.Module):
    """Attention whose kernel depends on whether its mask requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)
        self.mask = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x).unsqueeze(1).chunk(3, -1)
        mask = torch.tanh(self.mask).expand(len(x), 1, 6, 6)
        return x + scaled_dot_product_attention(query, key, value, attn_mask=mask).squeeze(1)


def test_a_forward_that_is_recomputed_takes_the_same_kernels() -> None:
    def sequences(batch_size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, 6, 8), "y": torch.randn(batch_size, 6, 4)}

    model_file = model_of(lambda: Chain(LearnedMask), batch=sequences)
    assert_same(model_file, plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, recompute=True))


class Tied(Chain):
    """One layer used five times."""

    def forward(self, x: Tensor) -> Tensor:
        again = self.layers[0]
        for layer in (again, again, self.layers[1], again, again, self.layers[2], again):
            x = torch.tanh(layer(x))
        output: Tensor = self.head(x)
        return output


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "boundaries", [(0, 8), (0, 2, 8), (0, 3, 5, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8)]
)
def test_a_weight_tied_inside_and_between_stages(
    boundaries: tuple[int, ...], recompute: bool
) -> None:
    model_file = model_of(lambda: Tied(lambda: nn.Linear(8, 8), 3))
    assert_same(model_file, plan_of(model_file, boundaries, recompute=recompute))


def test_a_weight_tied_between_three_ranks_and_two_replicas() -> None:
    model_file = model_of(lambda: Tied(lambda: nn.Linear(8, 8), 3))
    for num_replicas in (1, 2):
        plan = plan_of(
            model_file, (0, 1, 4, 6, 7, 8), num_pipeline_ranks=3, num_replicas=num_replicas
        )
        assert_same(model_file, plan, tolerance=1e-6)


@pytest.mark.parametrize("seed", [3, 6, 7])
def test_layers_of_odd_widths(seed: int) -> None:
    """Kernels for one sample add in another order where a weight is not aligned."""
    generator = torch.Generator().manual_seed(seed)
    widths = [8, *torch.randint(3, 150, (5,), generator=generator).tolist(), 8]
    pairs = itertools.cycle(itertools.pairwise(widths))

    def build() -> nn.Module:
        before, after = next(pairs)
        return nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.GELU())

    model_file = model_of(lambda: Chain(build, 6))
    assert_same(model_file, plan_of(model_file, (0, 6, 13), micro_batch_size=1))


def test_weights_keep_the_layout_that_the_model_gave_them() -> None:
    def images(batch_size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, 8, 6, 8), "y": torch.randn(batch_size, 8, 6, 4)}

    def build() -> nn.Module:
        model = Chain(lambda: nn.Conv2d(8, 8, 3, padding=1))
        return model.to(memory_format=torch.channels_last)

    model_file = model_of(build, batch=images)
    assert_same(model_file, plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2))
    plan = plan_of(model_file, (0, 2, 5), num_pipeline_ranks=2, num_replicas=2)
    assert_same(model_file, plan, tolerance=1e-6)
