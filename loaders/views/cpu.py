"""The view stage on the CPU: numba, a sample a thread; the specification is in `loaders.views.reference`.

A sample is worked on as three float32 planes, so that every loop runs over contiguous memory and becomes vector code.
The planes of a 224² view are 600 kB: they stay in a core's second-level cache from the first pass to the last.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numba
import numpy as np
import torch

from loaders.batch import Crops, Views
from loaders.parameters import ViewParameters
from loaders.recipe import Recipe
from loaders.transformation import Transformation, crop_transformation, source_pixels

# Sums may be reordered and fused; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "arcp", "nsz"}
_ZERO, _ONE, _TWO, _FOUR, _SIX = (np.float32(value) for value in (0, 1, 2, 4, 6))
_FROM_LEVEL = np.float32(1 / 255)
_GREY_RED, _GREY_GREEN, _GREY_BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_SOLARIZE_THRESHOLD = np.float32(128 / 255)


def make_views(
    crops: Crops,
    recipes: tuple[Recipe, ...],
    *,
    equivariance: Transformation | None = None,
    invariance: Transformation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Views:
    """As `loaders.views.reference.make_views`, for crops in main memory; computed in float32, then cast to `dtype`."""
    made, labels = [], None
    for number, (images, recipe) in enumerate(zip(crops.images, recipes, strict=True)):
        table = crops.parameters.view(number)
        transformation, labels = crop_transformation(
            table.element_word,
            is_last=number == len(recipes) - 1,
            equivariance=equivariance,
            invariance=invariance,
        )
        made.append(_augment(images.numpy(), table, recipe, transformation, labels).to(dtype))
    transformed = transformed_labels = None
    if equivariance is not None:
        transformed = made.pop()
        transformed_labels = equivariance.labels(len(crops.labels)) if labels is None else labels
    return Views(
        views=tuple(made),
        transformed=transformed,
        transformed_labels=transformed_labels,
        labels=crops.labels,
        indices=crops.indices,
    )


def _augment(
    images: np.ndarray,
    table: ViewParameters,
    recipe: Recipe,
    transformation: Transformation | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """(N, S, S, 3) uint8 → (N, 3, S, S) float32, channels-last, each by its own element of the transformation.

    Without `labels` all copies are made: (|G|·N, 3, S, S), block-ordered.
    """
    num_images, size = images.shape[:2]
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    pixels = source_pixels(transformation, size) if transformation is not None else None
    if transformation is not None and pixels is None:
        # The function wants levels in [0, 1]; it is torch's work, like normalising after it.
        view = _augment(images, table, replace(recipe, mean=(0, 0, 0), std=(1, 1, 1)), None, None)
        copies = transformation.copies(view) if labels is None else transformation.one_each(view, labels)
        copies = copies.sub_(torch.from_numpy(mean).view(3, 1, 1)).div_(torch.from_numpy(std).view(3, 1, 1))
        return copies.contiguous(memory_format=torch.channels_last)
    num_copies = transformation.num_elements if transformation is not None and labels is None else 1
    # numpy asks for huge pages, torch does not: faulting in 4 KiB pages costs more than the augmentations.
    out = np.empty((num_copies * num_images, size, size, 3), np.float32)
    _augment_all(
        images,
        table.flip,
        table.jitter,
        table.jitter_order,
        table.grey,
        table.blur_sigma,
        table.solarize,
        mean,
        1 / std,
        np.empty((0, 0), np.int64) if pixels is None else pixels.numpy(),
        np.empty(0, np.int64) if labels is None else labels.numpy(),
        out,
    )
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _augment_all(  # type: ignore[no-untyped-def]
    images, flip, jitter, jitter_order, grey, blur_sigma, solarize, mean, inverse_std, pixels, labels, out
):
    num_images, size = images.shape[0], images.shape[1]
    for n in numba.prange(num_images):
        image = np.empty((3, size, size), np.float32)
        planes = image.reshape((3, size * size))
        _load(images, n, flip[n] == 1, image)
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
            _blur(image, blur_sigma[n])
        if solarize[n] == 1:
            _solarize(planes)
        if len(pixels) == 0:
            _store(image, mean, inverse_std, out, n)
            continue
        view = np.empty((1, size, size, 3), np.float32)
        _store(image, mean, inverse_std, view, 0)
        if len(labels) > 0:
            _rearrange(view, pixels, labels[n], out, n)
        else:
            for element in range(len(pixels)):
                _rearrange(view, pixels, element, out, element * num_images + n)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _load(images, n, flip, image):  # type: ignore[no-untyped-def]
    size = image.shape[1]
    for y in range(size):
        for channel in range(3):
            for x in range(size):
                image[channel, y, x] = (
                    np.float32(images[n, y, size - 1 - x if flip else x, channel]) * _FROM_LEVEL
                )


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


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _blur_weights(sigma, radius):  # type: ignore[no-untyped-def]
    """2 · radius + 1 weights that sum to 1, and zeros up to a multiple of four."""
    num_taps = 2 * radius + 1
    weights = np.zeros((num_taps + 3) // 4 * 4, np.float32)
    total = 0.0
    for tap in range(num_taps):
        weights[tap] = math.exp(-0.5 * ((tap - radius) / sigma) ** 2)
        total += weights[tap]
    return weights / np.float32(total)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _blur(image, sigma):  # type: ignore[no-untyped-def]
    """Blur the (3, S, S) planes; both passes add four taps a sweep, from buffers with reflected borders."""
    size = image.shape[1]
    radius = min(int(math.ceil(3.0 * sigma)), size - 1)
    weights = _blur_weights(sigma, radius)
    row = np.zeros(size + len(weights), np.float32)
    rows = np.zeros((size + len(weights), size), np.float32)
    last = radius + size - 1
    for channel in range(3):
        for y in range(size):
            row[radius : radius + size] = image[channel, y]
            for k in range(1, radius + 1):  # reflected, the edge itself not repeated
                row[radius - k] = row[radius + k]
                row[last + k] = row[last - k]
            for tap in range(0, len(weights), 4):
                wa, wb, wc, wd = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
                # A slice, since an index that numba cannot see to be positive keeps the loop from becoming vector code.
                near = row[tap : tap + size + 3]
                for x in range(size):
                    rest = wa * near[x] + wb * near[x + 1] + wc * near[x + 2] + wd * near[x + 3]
                    rows[radius + y, x] = rest if tap == 0 else rows[radius + y, x] + rest
        for k in range(1, radius + 1):
            for x in range(size):
                rows[radius - k, x] = rows[radius + k, x]
                rows[last + k, x] = rows[last - k, x]
        for y in range(size):
            for tap in range(0, len(weights), 4):
                a = y + tap
                wa, wb, wc, wd = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
                for x in range(size):
                    rest = wa * rows[a, x] + wb * rows[a + 1, x] + wc * rows[a + 2, x] + wd * rows[a + 3, x]
                    image[channel, y, x] = rest if tap == 0 else image[channel, y, x] + rest


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _solarize(planes):  # type: ignore[no-untyped-def]
    for channel in range(3):
        for i in range(planes.shape[1]):
            x = planes[channel, i]
            planes[channel, i] = _ONE - x if x >= _SOLARIZE_THRESHOLD else x


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _store(image, mean, inverse_std, out, n):  # type: ignore[no-untyped-def]
    size = image.shape[1]
    for y in range(size):
        for x in range(size):
            for channel in range(3):
                out[n, y, x, channel] = (image[channel, y, x] - mean[channel]) * inverse_std[channel]


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _rearrange(view, pixels, element, out, row):  # type: ignore[no-untyped-def]
    """Write into a row of `out` the pixels of a view in the order of an element."""
    size = view.shape[1]
    for y in range(size):
        for x in range(size):
            source = pixels[element, y * size + x]
            source_y, source_x = source // size, source % size
            for channel in range(3):
                out[row, y, x, channel] = view[0, source_y, source_x, channel]
