"""The density of states from bands on a mesh, by linear interpolation over triangles.

In each triangle of the mesh a band is taken as linear, so the number of states below a frequency is a known area. The
density at a frequency is the number of states in the step around it, divided by the step: no state is lost between two
frequencies, and the density integrates to the number of bands. Each square of the mesh is divided along both of its
diagonals, with half the weight each, so that the result has the square's symmetry.

Source: Lehmann and Taut, physica status solidi (b) 54, 1972, in two dimensions.
"""

from __future__ import annotations

import numba
import numpy as np

NUM_FREQUENCIES = 500
MAX_FREQUENCY = 1.2
FREQUENCIES = np.linspace(0.0, MAX_FREQUENCY, NUM_FREQUENCIES)
"""Where densities of states are given, in 2πc / (a √⟨ε⟩): as if the crystal's mean permittivity were 1."""
NUM_PREDICTED = 400
"""The first so many are predicted (paper, section 6, as in its official release)."""
EMPTY_LATTICE = 2 * np.pi * FREQUENCIES
"""The density of states of a crystal without structure, on this scale, whatever its permittivity."""


def normalised_dos(
    frequencies: np.ndarray, mean_permittivity: float, *, smoothing: float = 0.0
) -> np.ndarray:
    """The density of states of a crystal on the scale of `FREQUENCIES`.

    A frequency ω̃ = ω √⟨ε⟩ has the density DOS(ω) / √⟨ε⟩, which is 2πω̃ without structure.

    Args: `frequencies` (n, n, B) of B bands on a mesh over the Brillouin zone, in 2πc/a; `mean_permittivity` ⟨ε⟩;
    `smoothing` standard deviation in ω̃.
    Returns: (500,) float64, states for each unit of ω̃ and cell.
    """
    step = FREQUENCIES[1]
    margin = int(np.ceil(4 * smoothing / step))
    edges = step * (np.arange(-margin, NUM_FREQUENCIES + margin + 1) - 0.5)
    counts = integrated_dos(frequencies * np.sqrt(mean_permittivity), edges)
    density = np.diff(counts) / step
    if not margin:
        return density
    weights = np.exp(-0.5 * (step * np.arange(-margin, margin + 1) / smoothing) ** 2)
    return np.convolve(density, weights / weights.sum(), mode="valid")


def integrated_dos(frequencies: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The number of states of a cell below some frequencies.

    Args: `frequencies` (n, n, B) of B bands on a periodic mesh; `below` (F,) ascending, equally spaced.
    Returns: (F,) float64, from 0 to B.
    """
    bands_first = np.ascontiguousarray(np.moveaxis(frequencies, 2, 0), dtype=np.float64)
    return _integrated(bands_first, np.ascontiguousarray(below, dtype=np.float64))


@numba.njit(cache=True, nogil=True)
def _integrated(frequencies, below):  # type: ignore[no-untyped-def]
    num_bands, num, _ = frequencies.shape
    counts = np.zeros(len(below))
    full = np.zeros(len(below) + 1)  # triangles that lie below from here on
    weight = 0.25 / (num * num)
    for band in range(num_bands):
        for i in range(num):
            for j in range(num):
                i1, j1 = (i + 1) % num, (j + 1) % num
                f00, f01 = frequencies[band, i, j], frequencies[band, i, j1]
                f10, f11 = frequencies[band, i1, j], frequencies[band, i1, j1]
                _add_triangle(f00, f01, f11, weight, below, counts, full)
                _add_triangle(f00, f10, f11, weight, below, counts, full)
                _add_triangle(f01, f00, f10, weight, below, counts, full)
                _add_triangle(f01, f11, f10, weight, below, counts, full)
    total = 0.0
    for e in range(len(below)):
        total += full[e]
        counts[e] += total
    return counts


@numba.njit(cache=True, nogil=True)
def _add_triangle(f1, f2, f3, weight, below, counts, full):  # type: ignore[no-untyped-def]
    """The share of a triangle, in which the frequency is linear from corner to corner, that is below each edge."""
    low, high = min(f1, f2, f3), max(f1, f2, f3)
    middle = f1 + f2 + f3 - low - high
    middle = min(max(middle, low), high)  # against rounding
    step = below[1] - below[0]
    first = max(0, int((low - below[0]) / step))  # or one more: rounding decides below
    for e in range(first, len(below)):
        f = below[e]
        if f >= high:
            full[e] += weight
            return
        if f < low:
            continue
        if f < middle:
            counts[e] += weight * (f - low) ** 2 / ((middle - low) * (high - low))
        else:
            counts[e] += weight * (1 - (high - f) ** 2 / ((high - middle) * (high - low)))
