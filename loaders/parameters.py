"""ViewParameters: every random choice of every view, drawn before any pixel is touched.

The draw is a pure function of (seed, epoch, sample index, view): Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and (index, epoch, view, block) as counter. Each purpose
has its block, so that no choice shifts another:

    block 0      flip, jitter on or off, grey, blur on or off
    block 1      brightness, contrast, saturation, hue
    block 2      jitter order, blur sigma, solarize, element of a transformation
    block 3 + t  t-th attempt at a crop box: area, log ratio, top, left
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numba
import numpy as np

from loaders.recipe import Recipe

NUM_BOX_ATTEMPTS = 10
"""Random boxes tried before the centred one is taken; as torchvision's RandomResizedCrop."""
FIRST_BOX_BLOCK = 3

_PERMUTATIONS = np.array(list(permutations(range(4))), dtype=np.uint8)
_IDENTITY_JITTER = np.array([1, 1, 1, 0], dtype=np.float32)
# One row of numbers a recipe, for the compiled draw.
_COLUMNS = [
    "center",
    "scale_low",
    "scale_high",
    "log_ratio_low",
    "log_ratio_high",
    "center_fraction",
    "flip_p",
    "jitter_p",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "grey_p",
    "blur_p",
    "blur_low",
    "blur_high",
    "solarize_p",
]
_COLUMN = {name: column for column, name in enumerate(_COLUMNS)}


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """The random choices of N samples and V views, as numpy columns (in the draw's order of V: the recipes')."""

    box: np.ndarray
    """(N, V, 4) int32: top, left, height, width of the crop, pixels of the stored image."""
    flip: np.ndarray
    """(N, V) uint8: 1 flips horizontally."""
    jitter: np.ndarray
    """(N, V, 4) float32: brightness, contrast and saturation factors, hue shift; exactly 1, 1, 1, 0 is 'leave out'."""
    jitter_order: np.ndarray
    """(N, V, 4) uint8: which of 0 brightness, 1 contrast, 2 saturation, 3 hue runs first, second, third, fourth."""
    grey: np.ndarray
    """(N, V) uint8: 1 converts to grey."""
    blur_sigma: np.ndarray
    """(N, V) float32: standard deviation of the Gaussian blur, pixels of the view; 0 is no blur."""
    solarize: np.ndarray
    """(N, V) uint8: 1 inverts levels of 128 and above."""
    element_word: np.ndarray
    """(N, V) uint32: uniform word that chooses the element of a transformation used as augmentation."""

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, rows: slice | np.ndarray) -> ViewParameters:
        """The same table for some of the samples."""
        return ViewParameters(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def view(self, view: int) -> ViewParameters:
        """The columns of one view, without the V axis, contiguous."""
        return ViewParameters(
            **{field.name: np.ascontiguousarray(getattr(self, field.name)[:, view]) for field in fields(self)}
        )


def draw_parameters(
    recipes: Sequence[Recipe],
    *,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> ViewParameters:
    """Draw the table of some samples, in any order and grouping: each row depends on its own index alone.

    Args: `indices` (N,) sample indices below 2**32; `heights`, `widths` (N,) pixels of the stored images;
    `seed` any 64-bit integer; `epoch` below 2**32.
    Returns: the table with N rows and one view a recipe.
    """
    shape = (len(indices), len(recipes))
    parameters = ViewParameters(
        box=np.empty((*shape, 4), np.int32),
        flip=np.empty(shape, np.uint8),
        jitter=np.empty((*shape, 4), np.float32),
        jitter_order=np.empty((*shape, 4), np.uint8),
        grey=np.empty(shape, np.uint8),
        blur_sigma=np.empty(shape, np.float32),
        solarize=np.empty(shape, np.uint8),
        element_word=np.empty(shape, np.uint32),
    )
    _draw(
        np.array([_settings(recipe) for recipe in recipes], dtype=np.float64),
        np.uint64(seed % 2**64),
        np.uint32(epoch),
        np.asarray(indices, dtype=np.uint32),
        np.asarray(heights, dtype=np.int32),
        np.asarray(widths, dtype=np.int32),
        parameters.box,
        parameters.flip,
        parameters.jitter,
        parameters.jitter_order,
        parameters.grey,
        parameters.blur_sigma,
        parameters.solarize,
        parameters.element_word,
    )
    return parameters


def _settings(recipe: Recipe) -> list[float]:
    derived = {
        "center": float(recipe.crop == "center"),
        "scale_low": recipe.scale[0],
        "scale_high": recipe.scale[1],
        "log_ratio_low": math.log(recipe.ratio[0]),
        "log_ratio_high": math.log(recipe.ratio[1]),
        "blur_low": recipe.blur_sigma[0],
        "blur_high": recipe.blur_sigma[1],
    }
    return [derived[name] if name in derived else getattr(recipe, name) for name in _COLUMNS]


@numba.njit(cache=True, nogil=True)
def philox(key: np.uint64, c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32):  # type: ignore[no-untyped-def]
    """Four random 32-bit words from a 64-bit key and a 128-bit counter: Philox4x32-10, Salmon et al. 2011."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    k0 = key & mask
    k1 = key >> shift
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * x0
        product1 = np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (product1 >> shift) ^ x1 ^ k0,
            product1 & mask,
            (product0 >> shift) ^ x3 ^ k1,
            product0 & mask,
        )
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return np.uint32(x0), np.uint32(x1), np.uint32(x2), np.uint32(x3)


@numba.njit(cache=True, nogil=True)
def _uniform(word, low, high):  # type: ignore[no-untyped-def]
    return low + (high - low) * (np.float64(word) * (1.0 / 4294967296.0))


@numba.njit(cache=True, nogil=True)
def _center_box(settings, height, width, box):  # type: ignore[no-untyped-def]
    side = max(1, int(round(min(height, width) * settings[_CENTER_FRACTION])))
    box[0], box[1] = (height - side) // 2, (width - side) // 2
    box[2], box[3] = side, side


@numba.njit(cache=True, nogil=True)
def _random_box(settings, key, index, epoch, view, height, width, box):  # type: ignore[no-untyped-def]
    area = float(height) * float(width)
    for attempt in range(NUM_BOX_ATTEMPTS):
        words = philox(key, index, epoch, view, np.uint32(FIRST_BOX_BLOCK + attempt))
        target = area * _uniform(words[0], settings[_SCALE_LOW], settings[_SCALE_HIGH])
        ratio = math.exp(_uniform(words[1], settings[_LOG_RATIO_LOW], settings[_LOG_RATIO_HIGH]))
        w = int(round(math.sqrt(target * ratio)))
        h = int(round(math.sqrt(target / ratio)))
        if 0 < w <= width and 0 < h <= height:
            box[0] = int(_uniform(words[2], 0.0, height - h + 1.0))
            box[1] = int(_uniform(words[3], 0.0, width - w + 1.0))
            box[2], box[3] = h, w
            return
    # No attempt fitted: the largest centred box within the allowed ratios, as torchvision's RandomResizedCrop.
    low, high = math.exp(settings[_LOG_RATIO_LOW]), math.exp(settings[_LOG_RATIO_HIGH])
    h, w = height, width
    if width < low * height:
        h = max(1, int(round(width / low)))
    elif width > high * height:
        w = max(1, int(round(height * high)))
    box[0], box[1] = (height - h) // 2, (width - w) // 2
    box[2], box[3] = h, w


_CENTER, _CENTER_FRACTION = _COLUMN["center"], _COLUMN["center_fraction"]
_SCALE_LOW, _SCALE_HIGH = _COLUMN["scale_low"], _COLUMN["scale_high"]
_LOG_RATIO_LOW, _LOG_RATIO_HIGH = _COLUMN["log_ratio_low"], _COLUMN["log_ratio_high"]
_FLIP_P, _JITTER_P, _GREY_P = _COLUMN["flip_p"], _COLUMN["jitter_p"], _COLUMN["grey_p"]
_BRIGHTNESS, _HUE = _COLUMN["brightness"], _COLUMN["hue"]
_BLUR_P, _BLUR_LOW, _BLUR_HIGH = _COLUMN["blur_p"], _COLUMN["blur_low"], _COLUMN["blur_high"]
_SOLARIZE_P = _COLUMN["solarize_p"]


@numba.njit(cache=True, nogil=True)
def _draw(  # type: ignore[no-untyped-def]
    settings,
    key,
    epoch,
    indices,
    heights,
    widths,
    box,
    flip,
    jitter,
    jitter_order,
    grey,
    blur_sigma,
    solarize,
    element_word,
):
    for n in range(len(indices)):
        index = indices[n]
        for v in range(len(settings)):
            row = settings[v]
            view = np.uint32(v)
            gates = philox(key, index, epoch, view, np.uint32(0))
            factors = philox(key, index, epoch, view, np.uint32(1))
            others = philox(key, index, epoch, view, np.uint32(2))
            flip[n, v] = _uniform(gates[0], 0.0, 1.0) < row[_FLIP_P]
            jitter[n, v] = _IDENTITY_JITTER
            if _uniform(gates[1], 0.0, 1.0) < row[_JITTER_P]:
                for op in range(3):
                    strength = row[_BRIGHTNESS + op]
                    if strength > 0:
                        jitter[n, v, op] = _uniform(factors[op], max(0.0, 1.0 - strength), 1.0 + strength)
                if row[_HUE] > 0:
                    jitter[n, v, 3] = _uniform(factors[3], -row[_HUE], row[_HUE])
            grey[n, v] = _uniform(gates[2], 0.0, 1.0) < row[_GREY_P]
            jitter_order[n, v] = _PERMUTATIONS[others[0] % np.uint32(24)]
            blur_sigma[n, v] = 0.0
            if _uniform(gates[3], 0.0, 1.0) < row[_BLUR_P]:
                blur_sigma[n, v] = _uniform(others[1], row[_BLUR_LOW], row[_BLUR_HIGH])
            solarize[n, v] = _uniform(others[2], 0.0, 1.0) < row[_SOLARIZE_P]
            element_word[n, v] = others[3]
            if row[_CENTER] > 0:
                _center_box(row, heights[n], widths[n], box[n, v])
            else:
                _random_box(row, key, index, epoch, view, heights[n], widths[n], box[n, v])
