"""Cells and their densities of states as one HDF5 file, which is whole or not there and is checked when opened.

    /                       format, format_version, cells, solver (JSON), digest
    /frequencies            (500,) float64
    /<split>/permittivity   (N, 32, 32) float32; splits: pretrain, train, validation, test
    /<split>/dos            (N, 500) float32; not in pretrain

Every data set carries its units, a description and its SHA-256; the digest is that of all of them and of the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from fast_essl.config import ConfigError
from fast_essl.config_io import build_settings
from fast_essl.photonics.cells import SIDE, CellsConfig
from fast_essl.photonics.dos import FREQUENCIES, NUM_FREQUENCIES
from fast_essl.photonics.solver import SolverConfig
from loaders.errors import DataError

FORMAT: Final = "fast_essl photonic crystals"
FORMAT_VERSION: Final = 1
SPLITS: Final = ("pretrain", "train", "validation", "test")
"""The position in this tuple keeps a split's cells apart from the others'; only the last three are labelled."""

_ABOUT: Final = {
    "frequencies": ("2πc / (a √⟨ε⟩)", "ω̃ = ω √⟨ε⟩, where densities of states are given"),
    "permittivity": ("1", "relative permittivity of each pixel of a cell of side a, rows from top to bottom"),
    "dos": ("a √⟨ε⟩ / (2πc)", "DOS(ω) / √⟨ε⟩ of TM states, for each cell; 2πω̃ without structure"),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The cells of a split."""

    permittivity: np.ndarray
    """(N, 32, 32) float32."""
    dos: np.ndarray | None
    """(N, 500) float32, None for the unlabelled."""

    def __len__(self) -> int:
        return len(self.permittivity)


@dataclass(frozen=True, kw_only=True)
class CellFile:
    """A file's content."""

    cells: CellsConfig
    solver: SolverConfig
    splits: dict[str, Split]
    digest: str
    """Names the content: settings, cells and labels."""


def write_cells(
    path: Path, *, cells: CellsConfig, solver: SolverConfig, splits: dict[str, Split]
) -> CellFile:
    """Write a file under its name only when it is whole and on the disk; returns its content with the digest.

    Errors: `OSError`, with the file of before untouched.
    """
    settings = {"cells": _json(cells), "solver": _json(solver)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, **settings})
            _write_array(file, "frequencies", FREQUENCIES)
            for name, split in splits.items():
                _write_array(file, f"{name}/permittivity", split.permittivity)
                if split.dos is not None:
                    _write_array(file, f"{name}/dos", split.dos)
            digest = _digest(settings, file)
            file.attrs["digest"] = digest
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return CellFile(cells=cells, solver=solver, splits=splits, digest=digest)


def read_cells(path: Path) -> CellFile:
    """Read a file into memory and check it against its checksums.

    Errors: `DataError` naming the file: not there, not one of these, of another version, damaged.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; make it with `fast-essl photonics generate`")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise DataError(
                    f"{path}: not a file of cells of fast_essl; make one with `fast-essl photonics generate`"
                )
            version = file.attrs.get("format_version")
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{path}: of format version {version}, this fast_essl reads {FORMAT_VERSION}; generate it anew"
                )
            settings = {name: str(file.attrs[name]) for name in ("cells", "solver")}
            arrays = {name: _read_array(file, name, path) for name in _names(file)}
            digest = _digest(settings, file)
            if file.attrs["digest"] != digest:
                raise DataError(f"{path}: damaged: its settings or checksums were changed; generate it anew")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: damaged, or not an HDF5 file ({reason}); generate it anew") from None
    splits = {
        name: Split(permittivity=arrays[f"{name}/permittivity"], dos=arrays.get(f"{name}/dos"))
        for name in SPLITS
        if f"{name}/permittivity" in arrays
    }
    for name, split in splits.items():
        _check_split(path, name, split)
    try:
        cells = build_settings(CellsConfig, json.loads(settings["cells"]), source=str(path))
        solver = build_settings(SolverConfig, json.loads(settings["solver"]), source=str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    return CellFile(cells=cells, solver=solver, splits=splits, digest=digest)


def _check_split(path: Path, name: str, split: Split) -> None:
    cells, dos = split.permittivity, split.dos
    if cells.shape[1:] != (SIDE, SIDE) or not np.isfinite(cells).all() or (cells.size and cells.min() < 1):
        raise DataError(f"{path}: {name}/permittivity: must be (N, {SIDE}, {SIDE}) numbers of 1 or more")
    if dos is not None and (dos.shape != (len(cells), NUM_FREQUENCIES) or not np.isfinite(dos).all()):
        raise DataError(f"{path}: {name}/dos: must be ({len(cells)}, {NUM_FREQUENCIES}) finite numbers")


def _json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _write_array(file: h5py.File, name: str, array: np.ndarray) -> None:
    units, description = _ABOUT[name.rpartition("/")[2]]
    data = file.create_dataset(name, data=array)
    data.attrs.update({"units": units, "description": description, "sha256": _sha256(array)})


def _read_array(file: h5py.File, name: str, path: Path) -> np.ndarray:
    array = np.ascontiguousarray(file[name][()])
    if file[name].attrs["sha256"] != _sha256(array):
        raise DataError(f"{path}: damaged: {name} is not what was written; generate it anew")
    return array


def _names(file: h5py.File) -> list[str]:
    """Of all data sets, with their groups."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(names)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


def _digest(settings: dict[str, str], file: h5py.File) -> str:
    checksums = {name: str(file[name].attrs["sha256"]) for name in _names(file)}
    return hashlib.sha256(json.dumps([settings, checksums], sort_keys=True).encode()).hexdigest()
