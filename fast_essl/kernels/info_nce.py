"""InfoNCE without its N×N similarities in memory: each block of them is made, used and forgotten, as attention is.

    normalise     both views' embeddings to unit rows, in their dtype                                 1 read, 1 write
    log-sum-exp   of each row's similarities to all of the other view, block by block, and its loss
    gradients     the similarities once more, and with them the gradients of the unit rows
    unnormalise   from those to the gradients of the embeddings

Row i of one view's similarities is column i of the other's, so one pass over the blocks makes the gradient of both
directions: with S = z₁·z₂ᵀ / T, r the log-sum-exps of its rows and c of its columns,

    dL/dS_ij = (e^(S_ij - r_i) + e^(S_ij - c_j) - 2·[i = j]) / 2N

Over several ranks each compares its own rows with all ranks' and needs, for the gradients of the whole batch, only the
others' unit rows and log-sum-exps: nothing is communicated in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast_essl.distributed import gather_rows, rank
from fast_essl.kernels.checks import check_rows

BLOCK = 64
"""Rows of either view in a block of similarities."""
CHUNK = 128
"""Elements of the embedding whose gradient a program makes; it makes all similarities of its rows for them."""
NORM_EPSILON = 1e-12
"""The least norm that is divided by, as torch.nn.functional.normalize has it."""


def info_nce_fused(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """As `losses.info_nce`, which is its reference; products in the embeddings' dtype, sums in fp32.

    Over several ranks the gradient that comes in must be the same on all of them, as it is for a loss.

    Args: `z1`, `z2` (N, E) fp32, bf16 or fp16 embeddings of the two views; `temperature` divides the similarities.
    Returns: fp32 scalar, nats.
    Errors: `ValueError` before any launch for another shape, dtype, layout or device.
    """
    for name, z in (("z1", z1), ("z2", z2)):
        check_rows(name, z)
    if z1.shape != z2.shape or z1.dtype != z2.dtype or z1.device != z2.device:
        raise ValueError(
            f"z1 is {z1.dtype}, {tuple(z1.shape)}, on {z1.device}; z2 {z2.dtype}, {tuple(z2.shape)}, on {z2.device}"
        )
    return _InfoNCE.apply(z1, z2, temperature)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
        num_rows, size = z1.shape
        unit = torch.empty((2, num_rows, size), dtype=z1.dtype, device=z1.device)
        inverse_norms, sums, losses = (torch.empty((2, num_rows), device=z1.device) for _ in range(3))
        width = triton.next_power_of_2(size)
        _normalise[(num_rows, 2)](
            z1, z1.stride(0), z2, z2.stride(0), unit, inverse_norms, num_rows, size, NORM_EPSILON, width
        )
        everyone = _gathered(unit)
        _log_sum_exp[(triton.cdiv(num_rows, BLOCK), 2)](
            unit, everyone, sums, losses, num_rows, everyone.shape[1], rank() * num_rows, size, 1 / temperature,
            block=BLOCK, part=_part(size), upcast=_upcast(),
        )  # fmt: skip
        ctx.save_for_backward(unit, everyone, inverse_norms, sums, _gathered(sums))
        ctx.temperature = temperature
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit, everyone, inverse_norms, sums, all_sums = ctx.saved_tensors
        _, num_rows, size = unit.shape
        dunit = torch.empty(unit.shape, device=unit.device)
        chunk = max(16, min(CHUNK, triton.next_power_of_2(size)))
        _gradients[(triton.cdiv(num_rows, BLOCK), triton.cdiv(size, chunk), 2)](
            unit, everyone, sums, all_sums, dunit, num_rows, everyone.shape[1], rank() * num_rows, size,
            1 / ctx.temperature, block=BLOCK, part=_part(size), chunk=chunk,
            upcast=_upcast(),
        )  # fmt: skip
        scale = gradients[0].float() / (2 * num_rows * ctx.temperature)
        dz = torch.empty_like(unit)
        _unnormalise[(num_rows, 2)](
            dunit, unit, inverse_norms, scale, dz, num_rows, size, NORM_EPSILON, triton.next_power_of_2(size)
        )
        return dz[0], dz[1], None


def _gathered(rows: Tensor) -> Tensor:
    """(2, N, …) of each rank → (2, R·N, …)."""
    return gather_rows(rows.transpose(0, 1)).transpose(0, 1).contiguous()


def _part(size: int) -> int:
    """Elements of the embedding that a matrix product takes at a time."""
    return max(16, min(64, triton.next_power_of_2(size)))


def _upcast() -> bool:
    """Triton 3.7's interpreter multiplies the bits of bf16 numbers; in fp32 their products are the same as a GPU's."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _product(a, b, added, upcast: tl.constexpr):  # type: ignore[no-untyped-def]
    if upcast:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    z1, z1_stride, z2, z2_stride, unit, inverse_norms, num_rows, size, epsilon, width: tl.constexpr
):
    row, view = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, width)
    if view == 0:
        values = tl.load(z1 + row * z1_stride + column, column < size, other=0).to(tl.float32)
    else:
        values = tl.load(z2 + row * z2_stride + column, column < size, other=0).to(tl.float32)
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(values * values)), epsilon)
    place = view * num_rows + row
    tl.store(unit + place * size + column, values * inverse, column < size)
    tl.store(inverse_norms + place, inverse)


@triton.jit
def _similarities(  # type: ignore[no-untyped-def]
    queries,
    keys,
    query,
    key,
    num_queries,
    num_keys,
    size,
    scale,
    block: tl.constexpr,
    part: tl.constexpr,
    upcast: tl.constexpr,
):
    """(block, block) similarities of unit rows; 0 beyond the last query or key."""
    product = tl.zeros((block, block), tl.float32)
    for start in range(0, size, part):
        column = start + tl.arange(0, part)
        own = (query < num_queries)[:, None] & (column < size)[None, :]
        others = (key < num_keys)[None, :] & (column < size)[:, None]
        q = tl.load(queries + query[:, None] * size + column[None, :], own, other=0)
        k = tl.load(keys + key[None, :] * size + column[:, None], others, other=0)
        product = _product(q, k, product, upcast)
    return product * scale


@triton.jit
def _log_sum_exp(  # type: ignore[no-untyped-def]
    unit,
    everyone,
    sums,
    losses,
    num_rows,
    num_keys,
    first_key,
    size,
    scale,
    block: tl.constexpr,
    part: tl.constexpr,
    upcast: tl.constexpr,
):
    view = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * block + tl.arange(0, block)
    queries, keys = unit + view * num_rows * size, everyone + (1 - view) * num_keys * size
    highest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    positive = tl.zeros((block,), tl.float32)
    for start in range(0, num_keys, block):
        key = start + tl.arange(0, block)
        s = _similarities(queries, keys, query, key, num_rows, num_keys, size, scale, block, part, upcast)
        own = (query + first_key)[:, None] == key[None, :]
        positive += tl.sum(tl.where(own, s, 0), 1)
        s = tl.where((key < num_keys)[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        highest = higher
    result = highest + tl.log(total)
    tl.store(sums + view * num_rows + query, result, query < num_rows)
    tl.store(losses + view * num_rows + query, result - positive, query < num_rows)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    unit,
    everyone,
    sums,
    all_sums,
    dunit,
    num_rows,
    num_keys,
    first_key,
    size,
    scale,
    block: tl.constexpr,
    part: tl.constexpr,
    chunk: tl.constexpr,
    upcast: tl.constexpr,
):
    """Σ_j (e^(S_ij - r_i) + e^(S_ij - c_j) - 2·[i is j]) · k_j, a chunk of the columns."""
    view = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.program_id(1) * chunk + tl.arange(0, chunk)
    queries, keys = unit + view * num_rows * size, everyone + (1 - view) * num_keys * size
    own_sums = tl.load(sums + view * num_rows + query, query < num_rows, other=0)
    result = tl.zeros((block, chunk), tl.float32)
    for start in range(0, num_keys, block):
        key = start + tl.arange(0, block)
        s = _similarities(queries, keys, query, key, num_rows, num_keys, size, scale, block, part, upcast)
        their_sums = tl.load(all_sums + (1 - view) * num_keys + key, key < num_keys, other=0)
        weights = tl.exp(s - own_sums[:, None]) + tl.exp(s - their_sums[None, :])
        weights -= tl.where((query + first_key)[:, None] == key[None, :], 2.0, 0.0)
        weights = tl.where((key < num_keys)[None, :], weights, 0)
        inside = (key < num_keys)[:, None] & (column < size)[None, :]
        k = tl.load(keys + key[:, None] * size + column[None, :], inside, other=0)
        result = _product(weights.to(k.dtype), k, result, upcast)
    place = dunit + view * num_rows * size + query[:, None] * size + column[None, :]
    tl.store(place, result, (query < num_rows)[:, None] & (column < size)[None, :])


@triton.jit
def _unnormalise(  # type: ignore[no-untyped-def]
    dunit, unit, inverse_norms, scale, dz, num_rows, size, epsilon, width: tl.constexpr
):
    place = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    column = tl.arange(0, width)
    gradient = tl.load(dunit + place * size + column, column < size, other=0)
    u = tl.load(unit + place * size + column, column < size, other=0).to(tl.float32)
    inverse = tl.load(inverse_norms + place)
    # A row that was too short to be normalised was divided by a constant.
    along = tl.where(inverse * epsilon < 1, tl.sum(gradient * u), 0)
    tl.store(dz + place * size + column, (gradient - along * u) * inverse * tl.load(scale), column < size)
