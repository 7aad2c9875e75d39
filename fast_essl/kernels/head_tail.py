"""The end of the prediction head: LayerNorm, ReLU, Linear to the logits, softmax cross-entropy; all in one kernel.

The kernel that computes the loss leaves all gradients behind, too: a row of the input is read once and its gradient
written once, and no logits, probabilities or normalised rows reach memory. The backward pass only multiplies what is
there by the gradient that comes in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_essl.kernels.checks import check_parameter, check_rows
from fast_essl.kernels.layer_norm_relu import MAX_PROGRAMS, layer_norm_relu_reference
from fast_essl.losses import block_labels, classification

MAX_MATRIX = 16_384
"""Elements of the last layer's weight, rounded up to powers of two: a program holds it and its gradient."""
SCALE_BLOCK = 4096


def head_tail(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool,
    labels: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of Linear(ReLU(LayerNorm(x))), the mean over the rows, computed in fp32 whatever the dtypes.

    Args: `x` (M, N) fp32, bf16 or fp16; `norm_weight`, `norm_bias` (N,); `weight` (C, N) and `bias` (C,) of the last
    layer; `relu` whether a ReLU stands behind the LayerNorm; `labels` (M,) int64 in [0, C), or None for block order,
    in which the first M / C rows have label 0, the next label 1, ….
    Returns: (loss, accuracy), fp32 scalars; no gradient passes the accuracy.
    Errors: `ValueError` before any launch for another shape, dtype, layout or device, or a weight that is too large.
    Source: the official release's prediction heads and their loss.
    """
    check_rows("x", x)
    num_classes = len(weight)
    check_size(weight)
    check_parameter("norm_weight", norm_weight, (x.shape[1],), x)
    check_parameter("norm_bias", norm_bias, (x.shape[1],), x)
    check_parameter("weight", weight, (num_classes, x.shape[1]), x)
    check_parameter("bias", bias, (num_classes,), x)
    if labels is None and len(x) % num_classes:
        raise ValueError(
            f"x has {len(x)} rows: in block order they must be a multiple of the {num_classes} classes"
        )
    if labels is not None and (labels.shape != (len(x),) or labels.dtype != torch.int64):
        raise ValueError(f"labels are {labels.dtype}, {tuple(labels.shape)}: must be int64, ({len(x)},)")
    if labels is not None and labels.device != x.device:
        raise ValueError(f"labels are on {labels.device}, x on {x.device}")
    loss, accuracy = _HeadTail.apply(x, norm_weight, norm_bias, weight, bias, relu, labels, epsilon)
    return loss, accuracy


def head_tail_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool,
    labels: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch; the last layer in the dtype of `x`, the loss at least in fp32."""
    y = layer_norm_relu_reference(x, norm_weight, norm_bias, relu=relu, epsilon=epsilon)
    logits = F.linear(y, weight.to(x.dtype), bias.to(x.dtype))
    if labels is None:
        labels = block_labels(len(x), len(weight), x.device)
    return classification(logits, labels)


def check_size(weight: Tensor) -> None:
    """Errors: `ValueError` for a last layer, (C, N), that a program cannot hold beside its gradient."""
    rows, columns = (triton.next_power_of_2(side) for side in weight.shape)
    if rows * columns > MAX_MATRIX:
        raise ValueError(
            f"the last layer has shape {tuple(weight.shape)}, in powers of two more than {MAX_MATRIX} elements"
        )


class _HeadTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        relu: bool,
        labels: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        (num_rows, size), num_classes = x.shape, len(weight)
        num_programs = min(num_rows, MAX_PROGRAMS)
        dx = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)

        def partial_sums(*shape: int) -> Tensor:
            return torch.empty((num_programs, *shape), device=x.device)

        # Of each program: its rows' losses and hits, then the gradients by the two vectors of the norm, …
        scores, dnorm, dweight, dbias = (
            partial_sums(2),
            partial_sums(2, size),
            partial_sums(num_classes, size),
            partial_sums(num_classes),
        )
        width = triton.next_power_of_2(size)
        _loss_and_gradients[(num_programs,)](
            x, x.stride(0), norm_weight, norm_bias, weight, bias, labels if labels is not None else x,
            dx, scores, dnorm, dweight, dbias, num_rows, num_rows // num_classes, size, num_classes, epsilon,
            relu=relu,
            by_position=labels is None,
            width=width,
            num_classes_padded=max(2, triton.next_power_of_2(num_classes)),
            num_warps=8 if width >= 1024 else 2,
        )  # fmt: skip
        loss, accuracy = scores.sum(dim=0) / num_rows
        (dnorm_weight, dnorm_bias) = dnorm.sum(dim=0)
        # The gradients of the sum of the losses: divided by the rows already, fp16 could not hold them.
        ctx.save_for_backward(dx, dnorm_weight, dnorm_bias, dweight.sum(dim=0), dbias.sum(dim=0))
        ctx.dtypes = [parameter.dtype for parameter in (norm_weight, norm_bias, weight, bias)]
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, *parameters = ctx.saved_tensors
        scale = gradients[0].float() / len(dx)
        # torch would round the factor to the tensor's dtype first.
        scaled = torch.empty_like(dx)
        _scaled[(triton.cdiv(dx.numel(), SCALE_BLOCK),)](dx, scale, scaled, dx.numel(), SCALE_BLOCK)
        made = [(gradient * scale).to(dtype) for gradient, dtype in zip(parameters, ctx.dtypes, strict=True)]
        return scaled, *made, None, None, None


@triton.jit
def _loss_and_gradients(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    norm_weight,
    norm_bias,
    weight,
    bias,
    labels,
    dx,
    scores,
    dnorm,
    dweight,
    dbias,
    num_rows,
    rows_a_class,
    size,
    num_classes,
    epsilon,
    relu: tl.constexpr,
    by_position: tl.constexpr,
    width: tl.constexpr,
    num_classes_padded: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column, number = tl.arange(0, width), tl.arange(0, num_classes_padded)
    inside, known = column < size, number < num_classes
    w = tl.load(norm_weight + column, inside, other=0).to(tl.float32)
    b = tl.load(norm_bias + column, inside, other=0).to(tl.float32)
    places = number[:, None] * size + column[None, :]
    matrix = tl.load(weight + places, known[:, None] & inside[None, :], other=0).to(tl.float32)
    offsets = tl.load(bias + number, known, other=0).to(tl.float32)
    loss, hits = 0.0, 0.0
    sum_dw = tl.zeros((width,), tl.float32)
    sum_db = tl.zeros((width,), tl.float32)
    sum_dmatrix = tl.zeros((num_classes_padded, width), tl.float32)
    sum_doffsets = tl.zeros((num_classes_padded,), tl.float32)
    for row in range(program, num_rows, num_programs):
        start = tl.cast(row, tl.int64)
        values = tl.load(x + start * x_stride + column, inside, other=0).to(tl.float32)
        centred = tl.where(inside, values - tl.sum(values) / size, 0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred) / size + epsilon)
        normal = centred * rstd
        y = normal * w + b
        passes = y > 0
        if relu:
            y = tl.where(passes, y, 0)

        logits = tl.where(known, tl.sum(matrix * y[None, :], 1) + offsets, float("-inf"))
        label = row // rows_a_class
        if not by_position:
            label = tl.load(labels + row).to(tl.int32)
        right = number == label
        highest = tl.max(logits)
        exponentials = tl.exp(logits - highest)
        total = tl.sum(exponentials)
        loss += highest + tl.log(total) - tl.sum(tl.where(right, logits, 0))
        hits += tl.where(tl.argmax(logits, 0) == label, 1.0, 0.0)

        dlogits = exponentials / total - tl.where(right, 1.0, 0.0)
        sum_doffsets += dlogits
        sum_dmatrix += dlogits[:, None] * y[None, :]
        dy = tl.sum(dlogits[:, None] * matrix, 0)
        if relu:
            dy = tl.where(passes, dy, 0)
        sum_dw += dy * normal
        sum_db += dy
        dnormal = dy * w
        along_mean, along_scale = tl.sum(dnormal) / size, tl.sum(dnormal * normal) / size
        tl.store(dx + start * size + column, rstd * (dnormal - along_mean - normal * along_scale), inside)
    tl.store(scores + 2 * program, loss)
    tl.store(scores + 2 * program + 1, hits)
    tl.store(dnorm + 2 * program * size + column, sum_dw, inside)
    tl.store(dnorm + (2 * program + 1) * size + column, sum_db, inside)
    tl.store(dweight + program * num_classes * size + places, sum_dmatrix, known[:, None] & inside[None, :])
    tl.store(dbias + program * num_classes + number, sum_doffsets, known)


@triton.jit
def _scaled(x, scale, out, num_elements, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    values = tl.load(x + place, place < num_elements).to(tl.float32)
    tl.store(out + place, values * tl.load(scale), place < num_elements)
