"""Unit cells of two-dimensional photonic crystals: two permittivities, divided by a level of a random Fourier sum.

    Blob    a sum without symmetry, or averaged over the square's eight symmetries; its highest point is moved into the
            middle of the cell, where there is then a blob
    Gpm     a sum with one mirror line, upright (plane group pm)

A cell is a pure function of (seed, split, index, settings): each random number is a word of Philox (see
`loaders.parameters`), so cells do not depend on how many others are made, or in which order or process.

Source: paper, section 6; the sums as in the generator of Loh et al., "Surrogate- and invariance-boosted contrastive
learning for data-scarce applications in science", Nature Communications 13, 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

from fast_essl.limits import require
from loaders.parameters import philox

SIDE = 32
"""Pixels along a cell; its length is the lattice constant a."""
MAX_PERMITTIVITY = 20.0
"""Of the paper's cells; images of cells have 1 at level 0 and this at level 1."""


@dataclass(frozen=True, kw_only=True)
class CellsConfig:
    """Which cells."""

    kind: Literal["blob", "gpm"] = "blob"
    """Data set of the paper."""
    max_order: int = 1
    """Largest wave number of the Fourier sum along each axis (the original generator: 1)."""
    symmetry: Literal["none", "square"] = "none"
    """Blob: whether the sum is averaged over the square's eight symmetries."""
    centred: bool = True
    """Blob: whether the highest point of the sum is moved into the middle. Where it lies anywhere, a half-period
    translation turns one cell into another that is as likely, and no network can tell it."""
    permittivity: tuple[float, float] = (1.0, MAX_PERMITTIVITY)
    """Range of both materials' relative permittivities, drawn uniformly and independently."""
    fill: tuple[float, float] = (0.01, 0.99)
    """Range of the share of the cell above the level, drawn uniformly."""
    seed: int = 0
    """Of all cells."""

    def __post_init__(self) -> None:
        require(self, "max_order", 1 <= self.max_order <= 4, "from 1 to 4")
        low, high = self.permittivity
        require(
            self,
            "permittivity",
            1 <= low <= high <= MAX_PERMITTIVITY,
            f"two numbers, 1 <= low <= high <= {MAX_PERMITTIVITY:g}",
        )
        require(self, "fill", 0 < self.fill[0] <= self.fill[1] < 1, "two shares, 0 < low <= high < 1")
        require(
            self,
            "symmetry",
            self.kind == "blob" or self.symmetry == "none",
            "'none' for gpm, which has its mirror line",
        )
        require(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")


def make_cell(config: CellsConfig, *, split: int, index: int) -> np.ndarray:
    """One unit cell.

    Args: `split` a small number that keeps the cells of a split apart from all others'; `index` below 2**32.
    Returns: (32, 32) float32 relative permittivities, periodic, rows from top to bottom.
    """
    order = config.max_order
    num_waves = (2 * order + 1) ** 2
    numbers = _uniform(config.seed, split, index, 3 + 2 * num_waves)
    fill, inside, outside = numbers[:3]
    amplitudes, phases = numbers[3 : 3 + num_waves], 2 * np.pi * numbers[3 + num_waves :]
    # At the pixels' centres, so that mirrors and rotations of the image are those of the crystal.
    x = 2 * np.pi * (np.arange(SIDE) + 0.5) / SIDE
    waves = np.arange(-order, order + 1)
    down, right = (axis.reshape(num_waves, 1, 1) for axis in np.meshgrid(waves, waves, indexing="ij"))
    angles = down * x[:, None] + right * x[None, :] + phases[:, None, None]
    sum_ = (amplitudes[:, None, None] * np.cos(angles)).sum(axis=0)
    sum_ = _averaged(sum_, _symmetries(config))
    if config.kind == "blob" and config.centred:
        sum_ = _centred(sum_, config.symmetry)
    level = np.quantile(sum_, 1 - _between(fill, config.fill))
    permittivities = [_between(number, config.permittivity) for number in (inside, outside)]
    return np.where(sum_ > level, *permittivities).astype(np.float32)


def _symmetries(config: CellsConfig) -> list[Callable[[np.ndarray], np.ndarray]]:
    if config.kind == "gpm":
        return [lambda image: image, np.fliplr]
    if config.symmetry == "square":
        rotations = [lambda image, k=k: np.rot90(image, k) for k in range(4)]
        return [*rotations, *(lambda image, turn=turn: np.fliplr(turn(image)) for turn in rotations)]
    return [lambda image: image]


def _averaged(image: np.ndarray, symmetries: list[Callable[[np.ndarray], np.ndarray]]) -> np.ndarray:
    """The mean over a group, rounded so that pixels which it makes equal are so to the last bit."""
    mean: np.ndarray = np.mean([symmetry(image) for symmetry in symmetries], axis=0)
    return mean.round(9)


def _centred(image: np.ndarray, symmetry: str) -> np.ndarray:
    """Rolled so that the highest pixel is in the middle; with the square's symmetry, the higher of its two centres."""
    middle = SIDE // 2
    if symmetry == "square":
        return np.roll(image, (middle, middle), (0, 1)) if image[0, 0] > image[middle, middle] else image
    row, column = np.unravel_index(np.argmax(image), image.shape)
    return np.roll(image, (middle - row, middle - column), (0, 1))


def _between(number: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


@numba.njit(cache=True, nogil=True)
def _words(seed, split, index, num):  # type: ignore[no-untyped-def]
    words = np.empty((num + 3) // 4 * 4, np.uint32)
    for block in range(len(words) // 4):
        words[4 * block : 4 * block + 4] = philox(
            seed, index, np.uint32(block), split, np.uint32(_CELL_STREAM)
        )
    return words[:num]


_CELL_STREAM = 0xCE11
"""Keeps the cells' counters apart from those of the views."""


def _uniform(seed: int, split: int, index: int, num: int) -> np.ndarray:
    """(num,) float64 in [0, 1)."""
    words = _words(np.uint64(seed), np.uint32(split), np.uint32(index), num)
    return words / 2.0**32
