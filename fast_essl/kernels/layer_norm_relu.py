"""LayerNorm, and the ReLU behind it, in one kernel each way: the hidden layers of the prediction head.

Under autocast torch computes LayerNorm in fp32 and leaves it and the ReLU's result in memory as fp32, to be rounded
again by the next layer. Here a row is read once, in the input's dtype, and written once; the backward pass makes the
normalised row anew from the input, so that between the passes only two numbers a row are kept.
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

TILE = 4096
"""Elements that a program works on at a time: whole rows, at least one."""
MAX_PROGRAMS = 256
"""Programs of the backward kernel, about two a multiprocessor: each leaves a partial sum of the weights' gradients."""


def layer_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = True, epsilon: float = 1e-5
) -> Tensor:
    """LayerNorm over the rows of a matrix, then ReLU if asked; computed in fp32, whatever the dtypes.

    Args: `x` (M, N) fp32, bf16 or fp16, N at most 16,384; `weight`, `bias` (N,); `epsilon` is added to the variance.
    Returns: (M, N) in the dtype of `x`, contiguous.
    Errors: `ValueError` before any launch for another shape, dtype, layout or device.
    Source: Ba et al., "Layer Normalization", 2016, as in the official release's prediction heads.
    """
    check_rows("x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_parameter(name, parameter, (x.shape[1],), x)
    return _LayerNormReLU.apply(x, weight, bias, relu, epsilon)


def layer_norm_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = True, epsilon: float = 1e-5
) -> Tensor:
    """The same in plain torch, at least in fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(dtype), (x.shape[1],), weight.to(dtype), bias.to(dtype), epsilon)
    return (F.relu(y) if relu else y).to(x.dtype)


class _LayerNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, epsilon: float) -> Tensor:
        num_rows, size = x.shape
        out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
        means, rstds = (torch.empty(num_rows, device=x.device) for _ in range(2))
        form = _form(size)
        _forward[(triton.cdiv(num_rows, form["rows"]),)](
            x, x.stride(0), weight, bias, out, means, rstds, num_rows, size, epsilon, relu=relu, **form
        )
        ctx.save_for_backward(x, weight, bias, means, rstds)
        ctx.relu = relu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstds = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        num_rows, size = x.shape
        form = _form(size)
        num_programs = min(triton.cdiv(num_rows, form["rows"]), MAX_PROGRAMS)
        dx = torch.empty_like(gradient, dtype=x.dtype)
        partials = torch.empty((2, num_programs, size), device=x.device)
        _backward[(num_programs,)](
            x, x.stride(0), weight, bias, means, rstds, gradient, dx, partials, num_rows, size,
            relu=ctx.relu, **form,
        )  # fmt: skip
        dweight, dbias = partials.sum(dim=1)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def _form(size: int) -> dict[str, int]:
    width = triton.next_power_of_2(size)
    return {"rows": max(1, min(16, TILE // width)), "width": width, "num_warps": 4 if width <= TILE else 8}


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    weight,
    bias,
    out,
    means,
    rstds,
    num_rows,
    size,
    epsilon,
    relu: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    start = row.to(tl.int64)[:, None]
    values = tl.load(x + start * x_stride + column[None, :], inside, other=0).to(tl.float32)
    mean = tl.sum(values, 1) / size
    centred = tl.where(inside, values - mean[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / size + epsilon)
    w = tl.load(weight + column, column < size, other=0).to(tl.float32)
    b = tl.load(bias + column, column < size, other=0).to(tl.float32)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    if relu:
        y = tl.maximum(y, 0)
    tl.store(out + start * size + column[None, :], y, inside)
    tl.store(means + row, mean, row < num_rows)
    tl.store(rstds + row, rstd, row < num_rows)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    weight,
    bias,
    means,
    rstds,
    gradient,
    dx,
    partials,
    num_rows,
    size,
    relu: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, width)
    w = tl.load(weight + column, column < size, other=0).to(tl.float32)[None, :]
    b = tl.load(bias + column, column < size, other=0).to(tl.float32)[None, :]
    dweight = tl.zeros((width,), tl.float32)
    dbias = tl.zeros((width,), tl.float32)
    for first in range(program * rows, num_rows, num_programs * rows):
        row = first + tl.arange(0, rows)
        inside = (row < num_rows)[:, None] & (column < size)[None, :]
        start = row.to(tl.int64)[:, None]
        values = tl.load(x + start * x_stride + column[None, :], inside, other=0).to(tl.float32)
        mean = tl.load(means + row, row < num_rows, other=0)[:, None]
        rstd = tl.load(rstds + row, row < num_rows, other=0)[:, None]
        normal = tl.where(inside, (values - mean) * rstd, 0)
        dy = tl.load(gradient + start * size + column[None, :], inside, other=0).to(tl.float32)
        if relu:
            dy = tl.where(normal * w + b > 0, dy, 0)
        dweight += tl.sum(dy * normal, 0)
        dbias += tl.sum(dy, 0)
        dnormal = dy * w
        along_mean = tl.sum(dnormal, 1) / size
        along_scale = tl.sum(dnormal * normal, 1) / size
        result = rstd * (dnormal - along_mean[:, None] - normal * along_scale[:, None])
        tl.store(dx + start * size + column[None, :], result, inside)
    place = partials + program * size + column
    tl.store(place, dweight, column < size)
    tl.store(place + num_programs * size, dbias, column < size)
