"""Kernels of a GPT layer, its head and its embedding as Megatron runs them, for any tensor degree.

Knows shapes and which kernels they take: unfused attention (two batched products, softmax and
dropout between them), fused bias and dropout, half precision. Does not know devices nor seconds.
Counts are per rank. Korthikanti et al., "Reducing activation recomputation in large transformer
models" (MLSys 2023), section 4, lists the layer's tensors; Shoeybi et al., "Megatron-LM"
(arXiv 1909.08053), section 3, what tensor parallelism splits and the all-reduces it adds.
"""

from dataclasses import dataclass
from functools import cache

from planner.profile import LayerProfile, OperatorClass, OperatorCount

__all__ = ["ELEMENT_BYTES", "GptShape", "gpt_head", "gpt_layer", "num_gpt_parameters"]

ELEMENT_BYTES = 2
"""Half precision."""
_DTYPE = "float16"
_ALIGNED_BYTES = 16
"""Tensor cores want rows that begin at multiples of this (cuBLAS documentation, "tensor core
usage")."""
_VOCABULARY_MULTIPLE = 128
"""To which Megatron pads each rank's part of a split vocabulary."""
_SMALL_BYTES = 1 << 14
"""Of an operation on vectors: it costs its launch."""
_NUM_SMALL = 8
"""Sums of gradients of the biases and norms, per layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptShape:
    """One layer's shape, and how it is cut into micro-batches and over tensor ranks."""

    hidden: int
    heads: int
    sequence: int
    micro_batch_size: int
    tensor: int
    """Degree of tensor parallelism."""
    vocabulary: int = 50257

    @property
    def num_tokens(self) -> int:
        return self.micro_batch_size * self.sequence

    @property
    def hidden_bytes(self) -> int:
        """Of one tensor between layers."""
        return self.num_tokens * self.hidden * ELEMENT_BYTES

    @property
    def rank_vocabulary(self) -> int:
        """Rows of the embedding on one rank: a split one is padded."""
        if self.tensor == 1:
            return self.vocabulary
        multiple = self.tensor * _VOCABULARY_MULTIPLE
        return -(-self.vocabulary // multiple) * _VOCABULARY_MULTIPLE


def num_gpt_parameters(shape: GptShape, num_layers: int, *, embeddings: int) -> int:
    """Parameters of one rank of a stage that holds `embeddings` copies of the word embedding.

    12 h^2 / T and 13 h per layer (Korthikanti et al., section 4); positions stand beside the first.
    """
    hidden = shape.hidden
    layers = num_layers * (12 * hidden * hidden // shape.tensor + 13 * hidden)
    return layers + embeddings * hidden * shape.rank_vocabulary


@cache
def gpt_layer(shape: GptShape) -> LayerProfile:
    """One transformer layer: attention and the block of two products, each with its norm."""
    forward, backward = _products(shape)
    attention_forward, attention_backward = _attention(shape)
    hidden, part = shape.hidden_bytes, shape.hidden_bytes // shape.tensor
    all_reduces = (hidden, hidden) if shape.tensor > 1 else ()
    norm, other = OperatorClass.NORMALISATION, OperatorClass.ELEMENTWISE
    return LayerProfile(
        name="layer",
        forward=(
            *forward,
            *attention_forward,
            _moves(2 * hidden, 2, norm),
            _moves(7 * hidden // 2, 2, other),  # bias, dropout with its mask, residual: one kernel
            _moves(2 * part, 1, other),  # heads back to rows
            _moves(8 * part, 1, other),  # bias and GELU on four times the width
        ),
        backward=(
            *backward,
            *attention_backward,
            _moves(3 * hidden, 2, norm),
            _moves(2 * hidden, 2, norm),
            _moves(3 * hidden, 2, other),
            _moves(5 * hidden // 2, 2, other),
            _moves(6 * part, 1, other),
            _moves(2 * part, 2, other),
            _moves(12 * part, 1, other),
            _moves(_SMALL_BYTES, _NUM_SMALL, other),
        ),
        parameter_bytes=num_gpt_parameters(shape, 1, embeddings=0) * ELEMENT_BYTES,
        saved_bytes=0,
        saved_tensors=("input",),
        forward_transient_bytes=0,
        backward_transient_bytes=0,
        forward_all_reduce_bytes=all_reduces,
        backward_all_reduce_bytes=all_reduces,
        provenance="counted by formula",
    )


@cache
def gpt_head(shape: GptShape, misaligned_efficiency: float) -> LayerProfile:
    """Product with the word embedding, and the cross-entropy over the vocabulary.

    Where a row of logits is no multiple of 16 bytes the product runs at `misaligned_efficiency` of
    its rate: its flop are counted as so many more.
    """
    rows, width, columns = shape.num_tokens, shape.hidden, shape.rank_vocabulary
    aligned = columns * ELEMENT_BYTES % _ALIGNED_BYTES == 0
    product = _product(rows, width, columns, 1, 1.0 if aligned else misaligned_efficiency)
    logits = rows * columns * ELEMENT_BYTES
    other = OperatorClass.ELEMENTWISE
    return LayerProfile(
        name="head",
        forward=(product, _moves(3 * logits, 1, other), _moves(2 * logits, 2, other)),
        backward=(
            product,
            product,
            _moves(2 * logits, 2, other),
            _moves(4 * logits, 1, other),
            _moves(3 * logits, 1, other),
            _moves(3 * width * columns * ELEMENT_BYTES, 1, other),
        ),
        parameter_bytes=width * columns * ELEMENT_BYTES,
        saved_bytes=0,
        saved_tensors=("input",),
        forward_transient_bytes=0,
        backward_transient_bytes=0,
        provenance="counted by formula",
    )


def _products(shape: GptShape) -> tuple[list[OperatorCount], list[OperatorCount]]:
    """The four products of a layer; backward has two of each, a bias sum and a gradient sum."""
    width, degree = shape.hidden, shape.tensor
    forward, backward = [], []
    for inner, columns in (
        (width, 3 * width // degree),
        (width // degree, width),
        (width, 4 * width // degree),
        (4 * width // degree, width),
    ):
        forward.append(_product(shape.num_tokens, inner, columns, 1))
        backward.append(_product(shape.num_tokens, inner, columns, 2))
        output_bytes = shape.num_tokens * columns * ELEMENT_BYTES
        backward.append(_moves(output_bytes, 1, OperatorClass.ELEMENTWISE))
        weight_bytes = inner * columns * ELEMENT_BYTES
        backward.append(_moves(3 * weight_bytes, 1, OperatorClass.ELEMENTWISE))
    return forward, backward


def _attention(shape: GptShape) -> tuple[list[OperatorCount], list[OperatorCount]]:
    """Scores, softmax, dropout, and scores times values."""
    part = shape.hidden_bytes // shape.tensor
    scores = shape.num_tokens * shape.sequence * shape.heads // shape.tensor * ELEMENT_BYTES
    flop = 2 * shape.num_tokens * shape.sequence * shape.hidden // shape.tensor

    def products(number: int) -> OperatorCount:
        return OperatorCount(
            flop=flop,
            moved_bytes=2 * part + scores,
            dtype=_DTYPE,
            num_kernels=number,
            kind=OperatorClass.ATTENTION,
        )

    other = OperatorClass.ELEMENTWISE
    dropout = _moves(5 * scores // 2, 1, other)  # its mask has one byte per element
    forward = [products(2), _moves(2 * scores, 1, other), dropout]
    return forward, [products(4), _moves(3 * scores, 1, other), dropout]


def _product(
    rows: int, inner: int, columns: int, number: int, efficiency: float = 1.0
) -> OperatorCount:
    elements = rows * inner + inner * columns + rows * columns
    return OperatorCount(
        flop=round(2 * rows * inner * columns / efficiency),
        moved_bytes=elements * ELEMENT_BYTES,
        dtype=_DTYPE,
        num_kernels=number,
        kind=OperatorClass.PRODUCT,
    )


def _moves(moved_bytes: int, number: int, kind: OperatorClass) -> OperatorCount:
    return OperatorCount(
        flop=0, moved_bytes=moved_bytes, dtype=_DTYPE, num_kernels=number, kind=kind
    )
