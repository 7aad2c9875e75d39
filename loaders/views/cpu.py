"""The view stage on the CPU: numba, a sample a thread; the specification is in `loaders.views.reference`.

A sample is worked on as three float32 planes, so that every loop runs over contiguous memory and becomes vector code. The
planes of a 224² view are 600 kB: they stay in a core's second-level cache from the first pass to the last.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from loaders.batch import NUM_ROTATIONS, Crops, Views
from loaders.parameters import ViewParameters
from loaders.recipe import Recipe

# Sums may be reordered and fused; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "arcp", "nsz"}
_ZERO, _ONE, _TWO, _FOUR, _SIX = (np.float32(value) for value in (0, 1, 2, 4, 6))
_FROM_LEVEL = np.float32(1 / 255)
_GREY_RED, _GREY_GREEN, _GREY_BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_SOLARIZE_THRESHOLD = np.float32(128 / 255)


def make_views(
    crops: Crops, recipes: tuple[Recipe, ...], *, rotate_last: bool, dtype: torch.dtype = torch.float32
) -> Views:
    """As `loaders.views.reference.make_views`, for crops in main memory; computed in float32, then cast to `dtype`."""
    views = [
        _augment(images.numpy(), crops.parameters.view(number), recipe, 1)
        for number, (images, recipe) in enumerate(zip(crops.images, recipes, strict=True))
        if not (rotate_last and number == len(recipes) - 1)
    ]
    transformed = labels = None
    if rotate_last:
        table = crops.parameters.view(len(recipes) - 1)
        transformed = _augment(crops.images[-1].numpy(), table, recipes[-1], NUM_ROTATIONS).to(dtype)
        labels = torch.arange(NUM_ROTATIONS).repeat_interleave(len(crops.labels))
    return Views(
        views=tuple(view.to(dtype) for view in views),
        transformed=transformed,
        transformed_labels=labels,
        labels=crops.labels,
        indices=crops.indices,
    )


def _augment(images: np.ndarray, table: ViewParameters, recipe: Recipe, num_copies: int) -> torch.Tensor:
    """(N, S, S, 3) uint8 → (num_copies · N, 3, S, S) float32, channels-last, block-ordered."""
    num_images, size = images.shape[:2]
    out = torch.empty(num_copies * num_images, 3, size, size).to(memory_format=torch.channels_last)
    _augment_all(
        images,
        table.flip,
        table.jitter,
        table.jitter_order,
        table.grey,
        table.blur_sigma,
        table.solarize,
        np.array(recipe.mean, np.float32),
        np.array([1 / deviation for deviation in recipe.std], np.float32),
        num_copies,
        out.permute(0, 2, 3, 1).numpy(),
    )
    return out


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _augment_all(  # type: ignore[no-untyped-def]
    images, flip, jitter, jitter_order, grey, blur_sigma, solarize, mean, inverse_std, num_copies, out
):
    num_images, size = images.shape[0], images.shape[1]
    for n in numba.prange(num_images):
        planes = np.empty((3, size * size), np.float32)
        _load(images, n, flip[n] == 1, planes)
        for step in range(4):
            op = jitter_order[n, step]
            strength = jitter[n, op]
            if op == 0 and strength != _ONE:
                _brightness(planes, strength)
            elif op == 1 and strength != _ONE:
                _contrast(planes, strength)
            elif op == 2 and strength != _ONE:
                _saturation(planes, strength)
            elif op == 3 and strength != _ZERO:
                _hue(planes, strength)
        if grey[n] == 1:
            _saturation(planes, _ZERO)
        if blur_sigma[n] > 0:
            _blur(planes, size, blur_sigma[n])
        if solarize[n] == 1:
            _solarize(planes)
        _store(planes, size, mean, inverse_std, out, n)
        if num_copies == 4:
            _rotate(out, n, num_images, size)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _load(images, n, flip, planes):  # type: ignore[no-untyped-def]
    size = images.shape[1]
    red, green, blue = planes[0], planes[1], planes[2]
    for y in range(size):
        start = y * size
        if flip:
            for x in range(size):
                red[start + x] = np.float32(images[n, y, size - 1 - x, 0]) * _FROM_LEVEL
                green[start + x] = np.float32(images[n, y, size - 1 - x, 1]) * _FROM_LEVEL
                blue[start + x] = np.float32(images[n, y, size - 1 - x, 2]) * _FROM_LEVEL
        else:
            for x in range(size):
                red[start + x] = np.float32(images[n, y, x, 0]) * _FROM_LEVEL
                green[start + x] = np.float32(images[n, y, x, 1]) * _FROM_LEVEL
                blue[start + x] = np.float32(images[n, y, x, 2]) * _FROM_LEVEL


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _clamp(x):  # type: ignore[no-untyped-def]
    return min(max(x, _ZERO), _ONE)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _grey(red, green, blue):  # type: ignore[no-untyped-def]
    return _GREY_RED * red + _GREY_GREEN * green + _GREY_BLUE * blue


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _brightness(planes, factor):  # type: ignore[no-untyped-def]
    for channel in range(3):
        for i in range(planes.shape[1]):
            planes[channel, i] = _clamp(planes[channel, i] * factor)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _contrast(planes, factor):  # type: ignore[no-untyped-def]
    total = 0.0
    for channel in range(3):
        weight = (_GREY_RED, _GREY_GREEN, _GREY_BLUE)[channel]
        plane_sum = np.float32(0)
        for i in range(planes.shape[1]):
            plane_sum += planes[channel, i]
        total += np.float64(weight * plane_sum)
    offset = np.float32(total / planes.shape[1]) * (_ONE - factor)
    for channel in range(3):
        for i in range(planes.shape[1]):
            planes[channel, i] = _clamp(planes[channel, i] * factor + offset)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _saturation(planes, factor):  # type: ignore[no-untyped-def]
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(planes.shape[1]):
        offset = _grey(red[i], green[i], blue[i]) * (_ONE - factor)
        red[i] = _clamp(red[i] * factor + offset)
        green[i] = _clamp(green[i] * factor + offset)
        blue[i] = _clamp(blue[i] * factor + offset)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _hue(planes, shift):  # type: ignore[no-untyped-def]
    """Turn the hue; a channel's value is `value - chroma · clamp(min(k, 4 - k), 0, 1)` at k sextants from its own."""
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(planes.shape[1]):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, g, b)
        chroma = value - min(r, g, b)
        inverse = _ONE / (chroma if chroma > _ZERO else _ONE)
        from_blue = _FOUR + (r - g) * inverse
        from_green = _TWO + (b - r) * inverse
        from_red = (g - b) * inverse
        sextant = from_red if value == r else (from_green if value == g else from_blue)
        sextant += _SIX * shift
        red[i] = _turned(value, chroma, sextant + np.float32(5))
        green[i] = _turned(value, chroma, sextant + np.float32(3))
        blue[i] = _turned(value, chroma, sextant + np.float32(1))


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _turned(value, chroma, k):  # type: ignore[no-untyped-def]
    # k lies in [-3, 13]: the hue in [-1, 5], the shift in ±3, the channel's offset up to 5.
    k = k + _SIX if k < _ZERO else k
    k = k - _SIX if k >= _SIX else k
    k = k - _SIX if k >= _SIX else k
    return _clamp(value - chroma * _clamp(min(k, _FOUR - k)))


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _blur(planes, size, sigma):  # type: ignore[no-untyped-def]
    radius = min(int(math.ceil(3.0 * sigma)), size - 1)
    weights = np.empty(radius + 1, np.float32)
    total = 0.0
    for k in range(radius + 1):
        weight = math.exp(-0.5 * (k / sigma) ** 2)
        weights[k] = weight
        total += weight if k == 0 else 2 * weight
    for k in range(radius + 1):
        weights[k] /= np.float32(total)
    row = np.empty(size + 2 * radius, np.float32)
    rows = np.empty((size, size), np.float32)
    for channel in range(3):
        plane = planes[channel].reshape((size, size))
        for y in range(size):
            for x in range(size):
                row[radius + x] = plane[y, x]
            for x in range(1, radius + 1):  # reflected, the edge itself not repeated
                row[radius - x] = plane[y, x]
                row[radius + size - 1 + x] = plane[y, size - 1 - x]
            for x in range(size):
                rows[y, x] = weights[0] * row[radius + x]
            for k in range(1, radius + 1):
                for x in range(size):
                    rows[y, x] += weights[k] * (row[radius + x - k] + row[radius + x + k])
        for y in range(size):
            for x in range(size):
                plane[y, x] = weights[0] * rows[y, x]
            for k in range(1, radius + 1):
                above = abs(y - k)
                below = y + k if y + k < size else 2 * (size - 1) - (y + k)
                for x in range(size):
                    plane[y, x] += weights[k] * (rows[above, x] + rows[below, x])


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _solarize(planes):  # type: ignore[no-untyped-def]
    for channel in range(3):
        for i in range(planes.shape[1]):
            x = planes[channel, i]
            planes[channel, i] = _ONE - x if x >= _SOLARIZE_THRESHOLD else x


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _store(planes, size, mean, inverse_std, out, n):  # type: ignore[no-untyped-def]
    red, green, blue = planes[0], planes[1], planes[2]
    for y in range(size):
        start = y * size
        for x in range(size):
            out[n, y, x, 0] = (red[start + x] - mean[0]) * inverse_std[0]
            out[n, y, x, 1] = (green[start + x] - mean[1]) * inverse_std[1]
            out[n, y, x, 2] = (blue[start + x] - mean[2]) * inverse_std[2]


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _rotate(out, n, num_images, size):  # type: ignore[no-untyped-def]
    """Write the copies at 90°, 180° and 270° counter-clockwise beside the one at 0°."""
    last = size - 1
    for y in range(size):
        for x in range(size):
            for channel in range(3):
                out[num_images + n, y, x, channel] = out[n, x, last - y, channel]
                out[2 * num_images + n, y, x, channel] = out[n, last - y, last - x, channel]
                out[3 * num_images + n, y, x, channel] = out[n, last - x, y, channel]
