"""Bands and densities of states against what is known: the literature's gap, the empty lattice, symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fast_essl.photonics.cells import CellsConfig, make_cell
from fast_essl.photonics.dos import (
    EMPTY_LATTICE,
    FREQUENCIES,
    NUM_FREQUENCIES,
    integrated_dos,
    normalised_dos,
)
from fast_essl.photonics.generate import labels_of
from fast_essl.photonics.solver import SolverConfig, bands, k_mesh, k_path, permittivity_matrix, plane_waves


def cell(index=0, **settings):
    return torch.from_numpy(make_cell(CellsConfig(**settings), split=0, index=index)).double()


def relative_error(dos, reference):
    """On the frequencies that count."""
    dos, reference = dos[100:400], reference[100:400]
    return np.abs(dos - reference).sum() / np.abs(reference).sum()


def test_the_gap_of_the_square_lattice_of_rods():
    """Permittivity 8.9, radius 0.2 a, in air: Joannopoulos et al., "Photonic Crystals", chapter 5, figure 2."""
    x = (np.arange(128) + 0.5) / 128 - 0.5
    rods = torch.from_numpy(np.where(np.hypot(x[:, None], x[None]) < 0.2, 8.9, 1.0))
    frequencies = bands(rods[None], k_path(8)[0], order=6)[0]
    assert frequencies[:, 0].max() == pytest.approx(0.32, abs=0.005)
    assert frequencies[:, 1].min() == pytest.approx(0.44, abs=0.005)


@pytest.mark.parametrize("permittivity", [1.0, 6.25])
def test_the_empty_lattice_has_the_analytic_bands(permittivity):
    k = torch.tensor([[0.0, 0.0], [0.3, -0.2], [0.5, 0.5]], dtype=torch.float64)
    frequencies = bands(torch.full((1, 32, 32), permittivity, dtype=torch.float64), k, order=3)[0]
    free = (k[:, None] + plane_waves(3)).norm(dim=-1).sort(dim=-1).values / permittivity**0.5
    assert torch.allclose(frequencies, free, atol=1e-7)


@pytest.mark.parametrize("permittivity", [1.0, 6.25])
def test_the_empty_lattice_has_the_analytic_density_of_states(permittivity):
    k, number = k_mesh(48)
    free = np.linalg.norm(k.numpy()[:, None] + plane_waves(4).numpy(), axis=-1)
    mesh = np.sort(free, axis=-1)[number] / permittivity**0.5
    assert relative_error(normalised_dos(mesh, permittivity, smoothing=0.01), EMPTY_LATTICE) < 0.005


def test_the_plane_waves_solve_maxwell_s_equation_as_it_stands():
    """The generalised problem |k+G|² E = ω² [ε] E, by its residual, and [ε] by the sum that defines it."""
    image, k, order = cell(1), torch.tensor([[0.2, 0.4]], dtype=torch.float64), 2
    g = plane_waves(order)
    # On a grid 32 times as fine as the pixels the integral over the cell is a sum, up to (π·ΔG/1024)²/6.
    fine = image.repeat_interleave(32, 0).repeat_interleave(32, 1)
    at = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    wave = torch.exp(-2j * torch.pi * torch.arange(-2 * order, 2 * order + 1)[:, None] * at)
    transform = wave @ fine.to(wave.dtype) @ wave.T / 1024**2
    difference = g[:, None] - g[None] + 2 * order
    matrix = permittivity_matrix(image[None], g)[0]
    assert torch.allclose(matrix, transform[difference[..., 0], difference[..., 1]], atol=1e-3)
    kinetic = (k + g).square().sum(-1)
    values = torch.linalg.eigvals(torch.linalg.solve(matrix, torch.diag(kinetic).to(matrix.dtype)))
    expected = values.real.sort().values.clamp(min=0).sqrt()
    assert torch.allclose(bands(image[None], k, order=order)[0, 0], expected, atol=1e-8)


def test_bands_do_not_change_with_the_origin_or_with_the_crystal_turned_or_mirrored_along_with_k():
    image = cell(2)
    k = torch.tensor([[0.13, 0.37], [0.5, 0.21]], dtype=torch.float64)
    expected = bands(image[None], k, order=4)
    down, right = k.unbind(-1)
    same = {
        "translation": (image.roll((5, 11), (0, 1)), k),
        "mirror": (image.flip(1), torch.stack([down, -right], -1)),
        # torch.rot90 takes the columns' axis to the rows' axis, backwards.
        "rotation": (torch.rot90(image), torch.stack([-right, down], -1)),
        "time reversal": (image, -k),
    }
    for name, (moved, at) in same.items():
        assert torch.allclose(bands(moved[None], at, order=4), expected, atol=1e-9), name
    assert not torch.allclose(bands(image[None], k.flip(-1), order=4), expected, atol=1e-4)


def test_the_density_of_states_does_not_change_either():
    image = cell(3).float()
    moved = [image, image.roll((7, 16), (0, 1)), image.flip(0), torch.rot90(image)]
    dos = labels_of(torch.stack(moved), SolverConfig(plane_wave_order=4, k_mesh=12))
    # A translation changes rounding alone; the others also which plane waves stand at the zone's boundary.
    for other, limit in zip(dos[1:], (1e-4, 2e-3, 2e-3), strict=True):
        assert relative_error(other, dos[0]) < limit


def test_frequencies_fall_as_plane_waves_are_added():
    image, k = cell(4), torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    lowest = [bands(image[None], k, order=order)[0, 0, :6] for order in (2, 4, 6)]
    assert (lowest[0] >= lowest[1]).all() and (lowest[1] >= lowest[2]).all()
    assert torch.allclose(lowest[1], lowest[2], rtol=5e-3)


def test_single_precision_is_enough():
    image, solver = cell(5).float()[None], {"plane_wave_order": 4, "k_mesh": 8}
    single, double = (labels_of(image, SolverConfig(precision=p, **solver))[0] for p in ("fp32", "fp64"))
    assert relative_error(single, double) < 1e-3


def test_the_density_of_states_integrates_to_the_number_of_bands():
    k, number = k_mesh(8)
    frequencies = bands(cell(6)[None], k, order=2)[0].numpy()[number]
    for num_bands in (1, 3):
        edges = np.linspace(0, frequencies[:, :, :num_bands].max() * 1.01, 200)
        counts = integrated_dos(frequencies[:, :, :num_bands], edges)
        assert counts[0] == pytest.approx(0, abs=1e-6) and counts[-1] == pytest.approx(num_bands, abs=1e-12)
        assert (np.diff(counts) >= -1e-12).all()


def test_the_triangles_against_counting_points_within_them():
    rng = np.random.default_rng(0)
    frequencies = rng.uniform(0, 1, (2, 2, 1))
    below = np.linspace(-0.1, 1.1, 25)
    u, v = (axis.ravel() for axis in np.meshgrid(*[(np.arange(500) + 0.5) / 500] * 2))
    expected = np.zeros(25)
    for i in range(2):
        for j in range(2):
            f00, f01 = frequencies[i, j, 0], frequencies[i, (j + 1) % 2, 0]
            f10, f11 = frequencies[(i + 1) % 2, j, 0], frequencies[(i + 1) % 2, (j + 1) % 2, 0]
            one = np.where(
                u > v, f00 + u * (f10 - f00) + v * (f11 - f10), f00 + v * (f01 - f00) + u * (f11 - f01)
            )
            s, t = u, 1 - v  # the other diagonal: from f01 to f10
            two = np.where(
                s > t, f01 + s * (f11 - f01) + t * (f10 - f11), f01 + t * (f00 - f01) + s * (f10 - f00)
            )
            expected += [((one < f).mean() + (two < f).mean()) / 8 for f in below]
    assert np.abs(integrated_dos(frequencies, below) - expected).max() < 2e-3


def test_flat_bands_and_equal_corners():
    """Where a triangle has no width in frequency its states lie in one step, and none is lost."""
    flat = np.full((4, 4, 1), 0.5)
    flat[0, 0] = 0.25
    counts = integrated_dos(flat, np.array([0.2, 0.3, 0.4, 0.5, 0.6]))
    assert counts[0] == 0 and 0 < counts[1] < counts[2] < 0.3 and (counts[3:] == 1).all()


def test_the_normalisation_is_the_official_one():
    """There the density at ω = ω̃ / √⟨ε⟩ is divided by √⟨ε⟩; the counts below ω are the same ones."""
    k, number = k_mesh(8)
    image = cell(7)
    mean = float(image.mean())
    frequencies = bands(image[None], k, order=2)[0].numpy()[number]
    step = FREQUENCIES[1] / np.sqrt(mean)
    edges = step * (np.arange(NUM_FREQUENCIES + 1) - 0.5)
    official = np.diff(integrated_dos(frequencies, edges)) / step / np.sqrt(mean)
    assert np.allclose(normalised_dos(frequencies, mean), official, rtol=1e-9, atol=1e-9)


def test_smoothing_keeps_the_states():
    k, number = k_mesh(8)
    frequencies = bands(cell(8)[None], k, order=2)[0].numpy()[number]
    sharp, smooth = (normalised_dos(frequencies, 5.0, smoothing=width) for width in (0, 0.01))
    assert smooth[:400].sum() == pytest.approx(sharp[:400].sum(), rel=0.01)
    assert np.abs(np.diff(smooth)).sum() < np.abs(np.diff(sharp)).sum()


@pytest.mark.parametrize("num", [4, 8])
def test_the_mesh_has_one_of_each_pair_of_opposite_points(num):
    k, number = k_mesh(num)
    assert len(k) == num * num // 2 + 2 and (k[0] == 0).all()
    i, j = np.divmod(np.arange(num * num), num)
    mesh = np.stack([i, j], 1) / num
    distance = k.numpy()[number.ravel()] - mesh
    opposite = k.numpy()[number.ravel()] + mesh
    whole = [np.abs(d - d.round()).max(axis=1) < 1e-12 for d in (distance, opposite)]
    assert (whole[0] | whole[1]).all()
    assert k.abs().max() <= 0.5


def test_permittivities_below_one_are_refused():
    with pytest.raises(ValueError, match="must be finite and 1 or more"):
        bands(torch.full((1, 8, 8), 0.9), torch.zeros(1, 2), order=1)
    with pytest.raises(ValueError, match="k_mesh = 7: must be even"):
        SolverConfig(k_mesh=7)
