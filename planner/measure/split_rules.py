"""What each operator does to the axes of its tensors: the rules of tensor parallelism.

A rule unites axes that stay one, marks axes that the operator needs in one piece, and names those
that it sums over: split, each rank then has a part of the sum, and an all-reduce adds the parts.
An operator without a rule needs all of its axes whole. Named by torch's operator packets. This
module knows operators. It does not know layers, nor which axes will be split.
"""

from collections.abc import Mapping

import torch

from planner.measure.split_call import Call, Value
from planner.measure.split_layout import LAYOUT_RULES, Rule, along

__all__ = ["apply_rule"]


def apply_rule(call: Call, func: torch._ops.OpOverload) -> None:
    """Relate the axes of one call's tensors."""
    rule = _RULES.get(call.name)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    (rule or _unknown)(call)


def _unknown(call: Call) -> None:
    for value in (*call.live, *call.outputs):
        call.axes.keep_whole(value.axes)


def _pointwise(call: Call) -> None:
    live = call.live
    for out in call.outputs:
        for value in live:
            call.like(value, out)
    call.is_linear = call.name in _ADDITIONS
    call.is_product = call.name == "mul" or (call.name == "div" and live == [call.args[0]])


def _loss(call: Call) -> None:
    """Element by element, then perhaps a sum over everything."""
    _pointwise(call)
    if not call.outputs[0].shape:
        call.summed += [axis for value in call.live for axis in value.axes]


def _needs(call: Call, source: Value, out: Value, dim: int) -> None:
    call.whole(source, dim)
    call.whole(out, dim)


def _softmax(call: Call, source: Value, out: Value, dim: int) -> None:
    """Of each row the largest element and the sum of exponentials; backward, one sum."""
    call.same(source, dim, out, dim)
    if source is call.live[0]:
        count = 1 if call.name.endswith("backward_data") else 2
        row_bytes = source.num_bytes // max(1, source.shape[dim])
        call.small += [(source.dim(dim), row_bytes)] * count


def _reduced(call: Call) -> list[int]:
    """The dimensions that a reduction removes (or leaves as 1); the others stay."""
    source, out = call.args[0], call.outputs[0]
    rank = len(source.shape)
    given = call.argument(1, "dim", None)
    if isinstance(given, int):
        given = [given]
    gone = [i % rank for i in given] if given and rank else list(range(rank))
    kept = [index for index in range(rank) if index not in gone]
    for value in call.outputs:
        places = kept if len(value.shape) == rank else range(len(kept))
        if len(value.shape) in (rank, len(kept)):
            for index, place in zip(kept, places, strict=True):
                call.same(source, index, value, place)
    assert source is not out
    return gone


def _sum(call: Call) -> None:
    call.is_linear = True
    for index in _reduced(call):
        call.summed += call.args[0].dim(index)


def _whole_reduction(call: Call) -> None:
    call.whole(call.args[0], *_reduced(call))


def _mm(call: Call) -> None:
    call.product(call.args[0], call.args[1], call.outputs[0])


def _addmm(call: Call) -> None:
    call.product(call.args[1], call.args[2], call.outputs[0])
    call.like(call.args[0], call.outputs[0])


def _vector_product(call: Call) -> None:
    """mv, dot: the last dimensions meet."""
    left, right = call.args[0], call.args[1]
    call.same(left, len(left.shape) - 1, right, 0)
    call.summed += left.dim(-1) or right.dim(0)
    if len(left.shape) == 2:
        call.same(left, 0, call.outputs[0], 0)


def _grouped(call: Call) -> None:
    """Rows sorted by group, a matrix each; or every group makes a matrix of its rows."""
    left, right, out = call.args[0], call.args[1], call.outputs[0]
    call.same(left, len(left.shape) - 1, right, len(right.shape) - 2)
    call.summed += left.dim(-1) or right.dim(-2)
    call.same(left, len(left.shape) - 2, out, len(out.shape) - 2)
    call.same(right, len(right.shape) - 1, out, len(out.shape) - 1)
    for value in (left, right, out):
        if len(value.shape) == 3:
            call.whole(value, 0)


def _grouped_backward(call: Call) -> None:
    """(gradient, rows, matrices) -> gradients of rows and of matrices."""
    gradient, rows, matrices = call.args[:3]
    row_gradient, matrix_gradient = call.outputs
    call.same(gradient, 1, matrices, 2)
    call.summed += gradient.dim(1)
    call.like(rows, row_gradient)
    call.like(matrices, matrix_gradient)
    call.same(rows, 1, matrices, 1)
    call.same(gradient, 0, rows, 0)
    call.whole(matrices, 0)


def _channels(call: Call, data: Value, out: Value, weight: Value, groups: int) -> list[int]:
    """Channels of a convolution; the axes that it sums over to make `out`."""
    for value in (data, out):
        call.whole(value, *range(2, len(value.shape)))
    call.whole(weight, *range(2, len(weight.shape)))
    call.same(data, 0, out, 0)
    if groups == 1:
        call.same(weight, 0, out, 1)
        call.same(weight, 1, data, 1)
        return weight.dim(1)
    if groups == data.shape[1] == out.shape[1]:
        call.same(weight, 0, out, 1)
        call.same(data, 1, out, 1)
        return []
    call.whole(data, 1)
    call.whole(out, 1)
    call.whole(weight, 0, 1)
    return []


def _convolution(call: Call) -> None:
    data, weight, bias = call.args[:3]
    out = call.outputs[0]
    if call.args[6]:
        _unknown(call)  # transposed: input and output channels change places
        return
    call.summed += _channels(call, data, out, weight, call.args[8])
    if isinstance(bias, Value):
        call.same(bias, 0, out, 1)


def _convolution_backward(call: Call) -> None:
    gradient, data, weight = call.args[:3]
    if call.args[7]:
        _unknown(call)
        return
    _channels(call, data, gradient, weight, call.args[9])
    if call.args[9] == 1 and call.args[10][0]:
        call.summed += weight.dim(0)
    for out, source in zip(call.outputs, (data, weight), strict=False):
        if len(out.shape) == len(source.shape) > 1:
            call.like(source, out)
    if call.args[10][2]:
        call.same(call.outputs[-1], 0, gradient, 1)


def _attention(call: Call) -> None:
    """Softmax of products within each head: heads are split, and the rest of a head is not."""
    tensors = [v for v in (*call.live, *call.outputs) if len(v.shape) >= 3]
    first = next((v for v in tensors if len(v.shape) == 4), None)
    if first is None:
        _unknown(call)
        return
    heads = first.shape[1]
    for value in tensors:
        call.whole(value, *range(2, len(value.shape)))
        call.same(value, 0, first, 0)
        if value.shape[1] == heads:
            call.same(value, 1, first, 1)
        elif value.shape[1] != 1 and value.dims is not None:
            call.axes.tie(value.dims[1], first.dim(1))


def _layer_norm(call: Call) -> None:
    """Normalises over the last dimensions, and needs them whole."""
    source = max((*call.live, *call.outputs), key=lambda value: len(value.shape))
    count = len(call.args[2] if call.name.endswith("backward") else call.args[1])
    for value in call.live + call.outputs:
        rank = len(value.shape)
        if rank == len(source.shape):
            call.whole(value, *range(rank - count, rank))
            for index in range(rank - count):
                call.same(value, index, source, index)
        else:
            call.axes.keep_whole(value.axes)


def _batch_norm(call: Call) -> None:
    """Of every channel on its own, over all samples and places."""
    source = max((*call.live, *call.outputs), key=lambda value: len(value.shape))
    for value in (*call.live, *call.outputs):
        if len(value.shape) == len(source.shape):
            call.same(value, 1, source, 1)
            call.whole(value, 0, *range(2, len(value.shape)))
        elif len(value.shape) == 1 and value.shape[0] == source.shape[1]:
            call.same(value, 0, source, 1)


def _embedding(call: Call) -> None:
    weight, indices, out = call.args[0], call.args[1], call.outputs[0]
    call.same(weight, 1, out, len(out.shape) - 1)
    call.whole(out, *range(len(indices.shape)))
    call.summed += weight.dim(0)


def _embedding_backward(call: Call) -> None:
    gradient, out = call.args[0], call.outputs[0]
    call.same(gradient, len(gradient.shape) - 1, out, 1)


def _nll_loss(call: Call) -> None:
    """Of every sample the one element that its label names: a rank has it or adds nothing."""
    source = call.args[0]
    dim = 1 if len(source.shape) > 1 else 0
    call.summed += source.dim(dim)
    call.whole(source, *(i for i in range(len(source.shape)) if i != dim))


def _nll_loss_backward(call: Call) -> None:
    call.like(call.args[1], call.outputs[0])


_ADDITIONS = {"add", "sub", "neg", "clone", "copy", "_to_copy", "alias", "detach"}
_RULES: Mapping[str, Rule] = {
    **LAYOUT_RULES,
    # Element by element, though torch does not say so.
    **dict.fromkeys(("_to_copy", "native_dropout", "hardswish_backward", "softplus_backward",
        "leaky_relu_backward", "elu_backward", "hardtanh_backward", "alias", "detach", "lift_fresh",
        "copy", "triu", "tril", "mse_loss_backward", "smooth_l1_loss_backward",
        "huber_loss_backward", "binary_cross_entropy_backward"), _pointwise),
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"), _loss),
    **dict.fromkeys(("cumsum", "cumprod"), along(1, "dim", _needs)),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), along(1, "dim", _softmax)),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"),
        along(2, "dim", _softmax)),
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "var_mean",
        "std", "logsumexp"), _whole_reduction),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm", "_addmm_activation"), _addmm),
    **dict.fromkeys(("mv", "dot"), _vector_product),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
    "grouped_mm_fallback_backward": _grouped_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys((f"_scaled_dot_product_{kind}attention{suffix}{backward}"
        for kind in ("flash_", "efficient_", "cudnn_")
        for suffix in ("", "_for_cpu")
        for backward in ("", "_backward")), _attention),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm",
        "_fused_rms_norm_backward"), _layer_norm),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update",
        "native_batch_norm_backward", "batch_norm_backward"), _batch_norm),
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll_loss),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _nll_loss_backward),
}  # fmt: skip
