"""TM bands of two-dimensional photonic crystals by plane-wave expansion, batched over cells and k points in torch.

Lengths are in units of the lattice constant a, wave vectors of 2π/a, frequencies of 2πc/a. For an electric field out of
the plane, E = Σ_G E_G exp(2πi (k+G)·r), Maxwell's equations read

    |k+G|² E_G = ω² Σ_G' ε_{G-G'} E_G'

and, with the field |k+G| E_G instead, are the eigenproblem of H = |k+G| [ε]⁻¹ |k+G|. Frequencies come from above as
plane waves are added. ε_G is the exact Fourier transform of the pixels as constant squares.

Source: Joannopoulos, Johnson, Winn and Meade, "Photonic Crystals: Molding the Flow of Light", 2nd edition, chapter 2
and appendix D; Ho, Chan and Soukoulis, Physical Review Letters 65, 1990.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fast_essl.limits import require


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How finely the bands are computed, and the density of states from them."""

    plane_wave_order: int = 4
    """Largest wave number of the plane waves along each axis: (2·order + 1)² of them."""
    k_mesh: int = 24
    """Points along each side of the Brillouin zone; even, so that the band edges at X and M are among them."""
    smoothing: float = 0.01
    """Standard deviation of the Gaussian that the density of states is smoothed with, in its frequency; 0 for none."""
    precision: Literal["fp32", "fp64"] = "fp32"
    """Of the eigenproblem."""

    def __post_init__(self) -> None:
        require(self, "plane_wave_order", 1 <= self.plane_wave_order <= 15, "from 1 to 15")
        even = self.k_mesh % 2 == 0
        require(self, "k_mesh", 4 <= self.k_mesh <= 512 and even, "even and 4 or more, at most 512")
        require(self, "smoothing", 0 <= self.smoothing <= 0.1, "in [0, 0.1]")


def bands(permittivity: Tensor, k: Tensor, *, order: int) -> Tensor:
    """The frequencies of all TM bands at some k points.

    Args: `permittivity` (C, S, S) relative, real, its dtype that of the computation; `k` (K, 2) in 2π/a, along the
    rows' and the columns' axis; `order` as in `SolverConfig`.
    Returns: (C, K, n) ascending, n = (2·order + 1)² plane waves, on the device of `permittivity`.
    Errors: `ValueError` for a permittivity below 1 or not finite.
    """
    if not bool((permittivity >= 1).all()) or not bool(permittivity.isfinite().all()):
        raise ValueError("permittivities must be finite and 1 or more")
    g = plane_waves(order).to(permittivity.device)
    inverse = torch.linalg.inv(permittivity_matrix(permittivity, g))
    length = torch.linalg.vector_norm(k.to(permittivity)[:, None] + g, dim=-1)
    matrices = length[:, :, None] * inverse[:, None] * length[:, None, :]
    return torch.linalg.eigvalsh(matrices).clamp(min=0).sqrt()


def plane_waves(order: int) -> Tensor:
    """(n, 2) int64, the wave vectors with both components in -order, …, order: a set with the square's symmetry."""
    waves = torch.arange(-order, order + 1)
    return torch.cartesian_prod(waves, waves)


def permittivity_matrix(permittivity: Tensor, g: Tensor) -> Tensor:
    """[ε]: (C, S, S) cells, (n, 2) wave vectors → (C, n, n) complex, ε_{G-G'}."""
    side = permittivity.shape[-1]
    difference = g[:, None] - g[None]
    samples = torch.fft.fft2(permittivity) / side**2
    rows, columns = difference.remainder(side).unbind(-1)
    share = difference.to(permittivity.dtype) / side
    # A pixel's own transform; its centre lies half a pixel from where the FFT has it.
    pixel = torch.sinc(share).prod(-1) * torch.exp(-1j * np.pi * share.sum(-1))
    return samples[:, rows, columns] * pixel


def k_mesh(num: int) -> tuple[Tensor, np.ndarray]:
    """A mesh of num × num points on the Brillouin zone, one of each pair k, -k, whose bands are the same.

    Returns: (num²/2 + 2, 2) float64 wave vectors in 2π/a, with Γ first; (num, num) the number of each mesh point's.
    """
    index = np.arange(num * num)
    row, column = np.divmod(index, num)
    opposite = (-row % num) * num + -column % num
    chosen, number = np.unique(np.minimum(index, opposite), return_inverse=True)
    k = np.stack(np.divmod(chosen, num), axis=1) / num
    k[k > 0.5] -= 1
    return torch.from_numpy(k), number.reshape(num, num)


def k_path(num: int) -> tuple[Tensor, np.ndarray, list[int]]:
    """Γ → X → M → Γ, with `num` steps on the first two legs.

    Returns: (K, 2) float64 wave vectors; (K,) the length so far, in 2π/a; the positions of Γ, X, M, Γ.
    """
    corners = np.array([[0, 0], [0.5, 0], [0.5, 0.5], [0, 0]])
    steps = [num, num, round(num * 2**0.5)]
    legs = [
        start + (end - start) * np.arange(1, count + 1)[:, None] / count
        for start, end, count in zip(corners[:-1], corners[1:], steps, strict=True)
    ]
    k = np.concatenate([corners[:1], *legs])
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(k, axis=0), axis=1))])
    return torch.from_numpy(k), lengths, [0, *np.cumsum(steps).tolist()]
