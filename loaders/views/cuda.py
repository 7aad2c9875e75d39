"""The view stage on a GPU: Triton, a tile of pixels a program; the specification is in `loaders.views.reference`.

    grey sums      mean grey of each sample at its own place in the jitter's order: contrast needs it      1 read
    colour         flip, jitter, grey; then solarize, normalise and all copies, or, if blurred, planes     1 read
    blur rows      the planes, blurred along their rows; only the samples that are blurred                 1 read
    blur columns   along their columns; then solarize, normalise and all copies                            1 read

Everything is computed in float32. The parameter table travels to the device in one copy a view, from pinned memory, and
nothing here waits for the device.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loaders.batch import Crops, Views, uploaded
from loaders.parameters import ViewParameters
from loaders.recipe import Recipe
from loaders.transformation import Transformation, crop_transformation, source_pixels
from loaders.views.reference import GREY_WEIGHTS, SOLARIZE_THRESHOLD, normalise

TILE = 32
"""Side of the square of pixels that a program works on; smaller for smaller views."""
SUM_BLOCK = 2048
"""Pixels that a program adds up."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Columns of the table on the device, int32; the jitter's bits are float32.
_JITTER, _ORDER, _FLIP, _GREY, _SOLARIZE, _ELEMENT, _BLUR, _RADIUS = (
    tl.constexpr(column) for column in (0, 4, 8, 9, 10, 11, 12, 13)
)
_NUM_COLUMNS = tl.constexpr(16)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (tl.constexpr(op) for op in range(4))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in GREY_WEIGHTS)
_THRESHOLD = tl.constexpr(SOLARIZE_THRESHOLD)


def make_views(
    crops: Crops,
    recipes: tuple[Recipe, ...],
    *,
    equivariance: Transformation | None = None,
    invariance: Transformation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Views:
    """As `loaders.views.reference.make_views`, for crops on a CUDA device, on its current stream.

    Errors: `ValueError` for images of another dtype, shape, layout or device, or for another result dtype.
    """
    made, labels = [], None
    for number, (images, recipe) in enumerate(zip(crops.images, recipes, strict=True)):
        table = crops.parameters.view(number)
        _check(images, table, dtype)
        transformation, labels = crop_transformation(
            table.element_word,
            is_last=number == len(recipes) - 1,
            equivariance=equivariance,
            invariance=invariance,
        )
        numbers = labels.numpy() if labels is not None else None
        made.append(_augment(images, table, recipe, transformation, numbers, dtype))
    transformed = transformed_labels = None
    if equivariance is not None:
        transformed, device = made.pop(), crops.labels.device
        all_labels = equivariance.labels(len(crops.labels), device)
        transformed_labels = all_labels if labels is None else uploaded(labels, device)
    return Views(
        views=tuple(made),
        transformed=transformed,
        transformed_labels=transformed_labels,
        labels=crops.labels,
        indices=crops.indices,
    )


def _check(images: Tensor, table: ViewParameters, dtype: torch.dtype) -> None:
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or not images.numel():
        raise ValueError(f"images have shape {tuple(images.shape)}: must be (N, S, S, 3), none of them 0")
    if images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(f"images are {images.dtype}, strides {images.stride()}: must be contiguous uint8")
    if len(table) != len(images):
        raise ValueError(f"{len(images)} images, but {len(table)} rows of parameters")
    if not images.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"images are on {images.device}: the view stage 'cuda' needs them on a CUDA device")
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, DTYPES))}")


def _augment(
    images: Tensor,
    table: ViewParameters,
    recipe: Recipe,
    transformation: Transformation | None,
    labels: np.ndarray | None,
    dtype: torch.dtype,
) -> Tensor:
    """(N, S, S, 3) uint8 → (N, 3, S, S) channels-last, each by its own element of the transformation.

    Without `labels` all copies are made: (|G|·N, 3, S, S), block-ordered.
    """
    num_images, size = images.shape[:2]
    moves = _destinations(transformation, size, images.device) if transformation is not None else None
    if transformation is not None and moves is None:
        # The function wants levels in [0, 1]; it is torch's work, like normalising after it.
        levels = replace(recipe, mean=(0, 0, 0), std=(1, 1, 1))
        view = _augment(images, table, levels, None, None, torch.float32)
        if labels is None:
            copies = transformation.copies(view)
        else:
            copies = transformation.one_each(view, uploaded(torch.from_numpy(labels), images.device))
        return normalise(copies, recipe).to(dtype, memory_format=torch.channels_last)
    num_copies = transformation.num_elements if transformation is not None and labels is None else 1
    out = torch.empty((num_copies * num_images, size, size, 3), dtype=dtype, device=images.device)
    blurred = np.flatnonzero(table.blur_sigma > 0).astype(np.int32)
    rows, weights, max_radius = _packed(table, labels, blurred, size)
    packed = uploaded(torch.from_numpy(np.concatenate([rows, blurred, weights])), images.device)
    rows_, blurred_, weights_ = packed.split([len(rows), len(blurred), len(weights)])
    weights_ = weights_.view(torch.float32)
    parameters = rows_, rows_.view(torch.float32)  # the same memory, as integers and as floats
    # Without a blurred sample the planes are never touched; a pointer must still be given.
    planes = torch.empty((2, len(blurred), 3, size, size) if len(blurred) else (2, 1), device=images.device)
    num_blocks = triton.cdiv(size * size, SUM_BLOCK)
    grey_sums = torch.empty((num_images, num_blocks), device=images.device)
    destinations, transposed = moves if moves is not None else (rows_, rows_)
    finish = {
        "destinations": destinations,
        "transposed": transposed,
        "mean_red": recipe.mean[0],
        "mean_green": recipe.mean[1],
        "mean_blue": recipe.mean[2],
        "scale_red": 1 / recipe.std[0],
        "scale_green": 1 / recipe.std[1],
        "scale_blue": 1 / recipe.std[2],
        "num_images": num_images,
        "size": size,
        "num_copies": num_copies,
        "moved": moves is not None,
        "tile": min(TILE, triton.next_power_of_2(size)),
    }
    num_tiles = triton.cdiv(size, finish["tile"]) ** 2
    _grey_sums[(num_images, num_blocks)](images, *parameters, grey_sums, size, num_blocks, SUM_BLOCK)
    _colour[(num_images, num_tiles)](
        images,
        *parameters,
        grey_sums,
        planes[0],
        out,
        **finish,
        num_blocks=num_blocks,
        sums_width=triton.next_power_of_2(num_blocks),
    )
    if len(blurred):
        _blur_rows[(3 * len(blurred), num_tiles)](
            planes[0], planes[1], blurred_, rows_, weights_, max_radius, size, finish["tile"]
        )
        _blur_columns[(len(blurred), num_tiles)](
            planes[1], blurred_, rows_, weights_, max_radius, out, **finish
        )
    return out.permute(0, 3, 1, 2)


def _packed(
    table: ViewParameters, labels: np.ndarray | None, blurred: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """What the kernels read of the table, flat int32: a row a sample; the weights of the blurred ones; their radius.

    Each blurred sample has 2 · radius + 1 weights, as floats' bits, with zeros around its own.
    """
    rows = np.zeros((len(table), _NUM_COLUMNS.value), np.int32)
    rows[:, _JITTER.value : _ORDER.value] = table.jitter.view(np.int32)
    rows[:, _ORDER.value : _FLIP.value] = table.jitter_order
    rows[:, _FLIP.value], rows[:, _GREY.value] = table.flip, table.grey
    rows[:, _SOLARIZE.value] = table.solarize
    rows[:, _ELEMENT.value] = 0 if labels is None else labels
    rows[:, _BLUR.value] = -1
    rows[blurred, _BLUR.value] = np.arange(len(blurred))
    weights, radii = _blur_weights(table.blur_sigma[blurred].astype(np.float64), size)
    rows[blurred, _RADIUS.value] = radii
    return rows.ravel(), weights.ravel().view(np.int32), weights.shape[1] // 2


def _blur_weights(sigmas: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`reference.gaussian_weights` of many: (B, 2 · R + 1) float32, zeros around the narrower ones; radii (B,)."""
    radii = np.minimum(np.ceil(3 * sigmas), size - 1).astype(np.int32)
    radius = radii.max(initial=0)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigmas[:, None]) ** 2) * (abs(offsets) <= radii[:, None])
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32), radii


@functools.cache
def _destinations(
    transformation: Transformation, size: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Where each element puts each pixel: (|G|, S·S) int32, and whether it turns rows into columns: (|G|,) int32.

    A turned element's pixels are listed column by column, so that what lies side by side in its copy is read, and
    written, side by side. None for a transformation that does more than move each pixel to a place of its own.
    """
    sources = source_pixels(transformation, size)
    if sources is None:
        return None
    destinations = sources.argsort(dim=1)
    if not torch.equal(sources.gather(1, destinations), torch.arange(size * size).expand_as(sources)):
        return None
    grids = destinations.view(-1, size, size)
    steps = [grids.diff(dim=dim).abs().eq(1).sum(dim=(1, 2)) for dim in (1, 2)]
    transposed = steps[0] > steps[1]
    grids = torch.where(transposed.view(-1, 1, 1), grids.transpose(1, 2), grids)
    return uploaded(grids.flatten(1).int(), device), uploaded(transposed.int(), device)


@triton.jit
def _clamp(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _grey_of(red, green, blue):  # type: ignore[no-untyped-def]
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _turned(value, chroma, sextant):  # type: ignore[no-untyped-def]
    """A channel at `sextant` of the colour circle; that lies in [-3, 13]."""
    k = tl.where(sextant < 0, sextant + 6, sextant)
    k = tl.where(k >= 6, k - 6, k)
    k = tl.where(k >= 6, k - 6, k)
    return _clamp(value - chroma * _clamp(tl.minimum(k, 4 - k)))


@triton.jit
def _adjusted(red, green, blue, op, strength, mean):  # type: ignore[no-untyped-def]
    """One operation of the jitter; `mean` grey is contrast's."""
    if op == _HUE:
        if strength != 0:
            value = tl.maximum(tl.maximum(red, green), blue)
            chroma = value - tl.minimum(tl.minimum(red, green), blue)
            inverse = 1 / tl.where(chroma == 0, 1.0, chroma)
            from_green = 2 + (blue - red) * inverse
            from_blue = 4 + (red - green) * inverse
            sextant = tl.where(value == green, from_green, from_blue)
            sextant = tl.where(value == red, (green - blue) * inverse, sextant) + 6 * strength
            red = _turned(value, chroma, sextant + 5)
            green = _turned(value, chroma, sextant + 3)
            blue = _turned(value, chroma, sextant + 1)
    elif strength != 1:
        # Brightness blends with black, contrast with one grey, saturation with each pixel's own.
        blend = mean + tl.zeros_like(red)
        if op == _BRIGHTNESS:
            blend = tl.zeros_like(red)
        if op == _SATURATION:
            blend = _grey_of(red, green, blue)
        blend *= 1 - strength
        red = _clamp(red * strength + blend)
        green = _clamp(green * strength + blend)
        blue = _clamp(blue * strength + blend)
    return red, green, blue


@triton.jit
def _loaded(images, n, pixels, inside, num_pixels):  # type: ignore[no-untyped-def]
    """Three planes of [0, 1]; the three loads share their cache lines."""
    source = images + n.to(tl.int64) * num_pixels * 3 + pixels * 3
    red = tl.load(source, inside, other=0).to(tl.float32) * (1 / 255)
    green = tl.load(source + 1, inside, other=0).to(tl.float32) * (1 / 255)
    blue = tl.load(source + 2, inside, other=0).to(tl.float32) * (1 / 255)
    return red, green, blue


@triton.jit
def _grey_sums(  # type: ignore[no-untyped-def]
    images, rows, row_floats, sums, size: tl.constexpr, num_blocks, block: tl.constexpr
):
    """Sums of grey as contrast finds it, (N, blocks); left alone for samples without contrast."""
    n, number = tl.program_id(0), tl.program_id(1)
    row, floats = rows + n * _NUM_COLUMNS, row_floats + n * _NUM_COLUMNS
    if tl.load(floats + _JITTER + _CONTRAST) != 1:
        pixels = number * block + tl.arange(0, block)
        inside = pixels < size * size
        red, green, blue = _loaded(images, n, pixels, inside, size * size)
        reached = False
        for step in tl.static_range(4):
            op = tl.load(row + _ORDER + step)
            reached = reached | (op == _CONTRAST)
            if not reached:
                red, green, blue = _adjusted(red, green, blue, op, tl.load(floats + _JITTER + op), 0.0)
        # What lies outside was loaded as 0, but hue and saturation of nothing need not be nothing.
        grey = tl.where(inside, _grey_of(red, green, blue), 0.0)
        tl.store(sums + n * num_blocks + number, tl.sum(grey))


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    red,
    green,
    blue,
    y,
    x,
    n,
    rows,
    out,
    destinations,
    transposed,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    num_images,
    size: tl.constexpr,
    num_copies: tl.constexpr,
    moved: tl.constexpr,
):
    """Solarize, normalise, and write a tile into each copy; `y` (T,) and `x` (T,) are its rows and columns."""
    row = rows + n * _NUM_COLUMNS
    if tl.load(row + _SOLARIZE) == 1:
        red = tl.where(red >= _THRESHOLD, 1 - red, red)
        green = tl.where(green >= _THRESHOLD, 1 - green, green)
        blue = tl.where(blue >= _THRESHOLD, 1 - blue, blue)
    red = (red - mean_red) * scale_red
    green = (green - mean_green) * scale_green
    blue = (blue - mean_blue) * scale_blue
    inside = (y < size)[:, None] & (x < size)[None, :]
    pixels = y[:, None] * size + x[None, :]
    if moved:
        first = tl.load(row + _ELEMENT)
        for copy in range(num_copies):
            element = first + copy
            places = destinations + element * size * size
            copy_out = out + (copy * num_images + n).to(tl.int64) * size * size * 3
            if tl.load(transposed + element) == 1:
                turned = x[:, None] * size + y[None, :]
                turned_inside = tl.trans(inside)
                place = tl.load(places + turned, turned_inside, other=0)
                _store(copy_out, place, turned_inside, tl.trans(red), tl.trans(green), tl.trans(blue))
            else:
                _store(copy_out, tl.load(places + pixels, inside, other=0), inside, red, green, blue)
    else:
        _store(out + n.to(tl.int64) * size * size * 3, pixels, inside, red, green, blue)


@triton.jit
def _store(out, place, inside, red, green, blue):  # type: ignore[no-untyped-def]
    """Write pixels with their channels side by side: as one store, since three would each touch every sector."""
    # (T, T, 2, 2) is red, green; blue, nothing.
    values = tl.join(tl.join(red, blue), tl.join(green, green))
    values = tl.reshape(values, (red.shape[0], red.shape[1], 4))
    channel = tl.arange(0, 4)[None, None, :]
    tl.store(out + place[:, :, None] * 3 + channel, values, inside[:, :, None] & (channel < 3))


@triton.jit
def _tile(number, size: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of a tile, (T,) each."""
    across = tl.cdiv(size, tile)
    return number // across * tile + tl.arange(0, tile), number % across * tile + tl.arange(0, tile)


@triton.jit
def _colour(  # type: ignore[no-untyped-def]
    images,
    rows,
    row_floats,
    grey_sums,
    planes,
    out,
    destinations,
    transposed,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    num_images,
    size: tl.constexpr,
    num_copies: tl.constexpr,
    moved: tl.constexpr,
    tile: tl.constexpr,
    num_blocks: tl.constexpr,
    sums_width: tl.constexpr,
):
    n = tl.program_id(0)
    y, x = _tile(tl.program_id(1), size, tile)
    row, floats = rows + n * _NUM_COLUMNS, row_floats + n * _NUM_COLUMNS
    inside = (y < size)[:, None] & (x < size)[None, :]
    column = tl.where(tl.load(row + _FLIP) == 1, size - 1 - x, x)
    pixels = y[:, None] * size + column[None, :]
    red, green, blue = _loaded(images, n, pixels, inside, size * size)
    block = tl.arange(0, sums_width)  # never written for a sample without contrast, and then not used
    mean = tl.sum(tl.load(grey_sums + n * num_blocks + block, block < num_blocks, other=0.0)) / (size * size)
    for step in tl.static_range(4):
        op = tl.load(row + _ORDER + step)
        red, green, blue = _adjusted(red, green, blue, op, tl.load(floats + _JITTER + op), mean)
    if tl.load(row + _GREY) == 1:
        red = _clamp(_grey_of(red, green, blue))
        green, blue = red, red
    blur = tl.load(row + _BLUR)
    if blur >= 0:
        plane = planes + blur.to(tl.int64) * 3 * size * size + y[:, None] * size + x[None, :]
        tl.store(plane, red, inside)
        tl.store(plane + size * size, green, inside)
        tl.store(plane + 2 * size * size, blue, inside)
    else:
        _finished(
            red, green, blue, y, x, n, rows, out, destinations, transposed,
            mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
            num_images, size, num_copies, moved,
        )  # fmt: skip


@triton.jit
def _reflected(position, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Beyond a border the image is mirrored, the edge itself not repeated."""
    position = tl.abs(position)
    return tl.where(position < size, position, 2 * (size - 1) - position)


@triton.jit
def _blur_rows(  # type: ignore[no-untyped-def]
    planes, blurred_planes, blurred, rows, weights, max_radius, size: tl.constexpr, tile: tl.constexpr
):
    """Blur each plane of the blurred samples along its rows."""
    plane = tl.program_id(0)
    number = plane // 3
    y, x = _tile(tl.program_id(1), size, tile)
    inside = (y < size)[:, None] & (x < size)[None, :]
    radius = tl.load(rows + tl.load(blurred + number) * _NUM_COLUMNS + _RADIUS)
    own_weights = weights + number * (2 * max_radius + 1) + max_radius
    start = plane.to(tl.int64) * size * size
    total = tl.zeros((tile, tile), tl.float32)
    for offset in range(-radius, radius + 1):
        column = _reflected(x + offset, size)
        values = tl.load(planes + start + y[:, None] * size + column[None, :], inside, other=0.0)
        total += tl.load(own_weights + offset) * values
    tl.store(blurred_planes + start + y[:, None] * size + x[None, :], total, inside)


@triton.jit
def _blur_columns(  # type: ignore[no-untyped-def]
    planes,
    blurred,
    rows,
    weights,
    max_radius,
    out,
    destinations,
    transposed,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    num_images,
    size: tl.constexpr,
    num_copies: tl.constexpr,
    moved: tl.constexpr,
    tile: tl.constexpr,
):
    """Blur the planes along their columns, and finish."""
    number = tl.program_id(0)
    y, x = _tile(tl.program_id(1), size, tile)
    inside = (y < size)[:, None] & (x < size)[None, :]
    n = tl.load(blurred + number)
    radius = tl.load(rows + n * _NUM_COLUMNS + _RADIUS)
    own_weights = weights + number * (2 * max_radius + 1) + max_radius
    start = planes + number.to(tl.int64) * 3 * size * size
    red = tl.zeros((tile, tile), tl.float32)
    green = tl.zeros((tile, tile), tl.float32)
    blue = tl.zeros((tile, tile), tl.float32)
    for offset in range(-radius, radius + 1):
        weight = tl.load(own_weights + offset)
        source = start + _reflected(y + offset, size)[:, None] * size + x[None, :]
        red += weight * tl.load(source, inside, other=0.0)
        green += weight * tl.load(source + size * size, inside, other=0.0)
        blue += weight * tl.load(source + 2 * size * size, inside, other=0.0)
    _finished(
        red, green, blue, y, x, n, rows, out, destinations, transposed,
        mean_red, mean_green, mean_blue, scale_red, scale_green, scale_blue,
        num_images, size, num_copies, moved,
    )  # fmt: skip
