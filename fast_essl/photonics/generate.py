"""Cells and labels into a file: in threads on a CPU, in batches on a CUDA device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fast_essl.config import ConfigError
from fast_essl.limits import require_range
from fast_essl.photonics.cells import SIDE, CellsConfig, make_cell
from fast_essl.photonics.dos import NUM_FREQUENCIES, normalised_dos
from fast_essl.photonics.solver import SolverConfig, bands, k_mesh
from fast_essl.photonics.store import SPLITS, CellFile, Split, read_cells, write_cells

MAX_BANDS = 40
"""Bands that the density of states is taken from; far more than reach its frequencies."""
MAX_CELLS = 10**7
"""Of a split; 40 GB of them."""
_CUDA_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class CountsConfig:
    """How many cells; a split's cells do not depend on how many there are of others."""

    pretrain: int = 15000
    """Unlabelled cells (paper: 15,000 Blob, 20,480 Gpm)."""
    train: int = 3000
    """Labelled cells to fine-tune on (paper: 3,000)."""
    validation: int = 500
    """Labelled cells to choose settings by."""
    test: int = 2000
    """Labelled cells that results are told on (paper: 2,000)."""

    def __post_init__(self) -> None:
        require_range(self, " ".join(SPLITS), 0, MAX_CELLS)


def generate(
    path: Path,
    *,
    cells: CellsConfig,
    solver: SolverConfig,
    counts: CountsConfig,
    device: torch.device,
    num_threads: int,
    overwrite: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = print,
) -> CellFile:
    """Make a file of cells, or take the one that is there and holds just these.

    Args: `device` of the solver; `num_threads` on a CPU.
    Errors: `ConfigError` where the file holds others and `overwrite` is not set; `DataError` where it is damaged.
    """
    if path.exists() and not overwrite:
        found = read_cells(path)
        sizes = CountsConfig(**{name: len(found.splits[name]) for name in SPLITS})
        if (found.cells, found.solver, sizes) != (cells, solver, counts):
            raise ConfigError(f"{path}: holds cells of other settings; choose another file, or --overwrite")
        say(f"{path}: there already, with just these cells")
        return found
    total = sum(getattr(counts, name) for name in SPLITS)
    splits = {}
    with tqdm(
        total=total, unit="cell", disable=not show_progress, mininterval=0.5 if sys.stderr.isatty() else 20
    ) as bar:
        for number, name in enumerate(SPLITS):
            bar.set_description(name)
            num, labelled = getattr(counts, name), name != "pretrain"

            def make(index: int, number: int = number) -> np.ndarray:
                return make_cell(cells, split=number, index=index)

            images = np.zeros((num, SIDE, SIDE), np.float32)
            dos = None
            for index, image in enumerate(map(make, range(num))):
                images[index] = image
                bar.update(not labelled)
            if labelled:
                rows = _labels(images, solver, device, num_threads)
                dos = np.array([_counted(row, bar) for row in rows], np.float32).reshape(num, NUM_FREQUENCIES)
            splits[name] = Split(permittivity=images, dos=dos)
    return write_cells(path, cells=cells, solver=solver, splits=splits)


def labels_of(permittivity: Tensor, solver: SolverConfig) -> np.ndarray:
    """The densities of states of some cells, computed where they lie.

    Args: `permittivity` (C, S, S).
    Returns: (C, 500) float64, see `normalised_dos`.
    """
    k, number = k_mesh(solver.k_mesh)
    dtype = torch.float32 if solver.precision == "fp32" else torch.float64
    frequencies = (
        bands(permittivity.to(dtype), k, order=solver.plane_wave_order)[:, :, :MAX_BANDS].cpu().numpy()
    )
    means = permittivity.mean(dim=(1, 2), dtype=torch.float64).tolist()
    return np.stack(
        [
            normalised_dos(frequencies_[number], mean, smoothing=solver.smoothing)
            for frequencies_, mean in zip(frequencies, means, strict=True)
        ]
    )


def _labels(
    images: np.ndarray, solver: SolverConfig, device: torch.device, num_threads: int
) -> Iterator[np.ndarray]:
    """The density of states of each cell, in order."""
    cells = torch.from_numpy(images)
    if device.type == "cuda":
        for batch in cells.split(_CUDA_BATCH):
            yield from labels_of(batch.to(device), solver)
        return

    # LAPACK holds no lock of Python's: a thread a core, each with one of torch's, is the fastest.
    def label(cell: Tensor) -> np.ndarray:
        torch.set_num_threads(1)
        return labels_of(cell[None], solver)[0]

    before = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            yield from threads.map(label, cells)
        finally:
            threads.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _counted(row: np.ndarray, bar: tqdm) -> np.ndarray:
    bar.update()
    return row
