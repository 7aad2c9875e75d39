"""Files of cells: what is written is read, everything else is refused in one line."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch

from fast_essl.config import ConfigError
from fast_essl.photonics.cells import CellsConfig, make_cell
from fast_essl.photonics.dos import FREQUENCIES
from fast_essl.photonics.generate import CountsConfig, generate, labels_of
from fast_essl.photonics.solver import SolverConfig
from fast_essl.photonics.store import SPLITS, read_cells
from loaders.errors import DataError

SETTINGS = {
    "cells": CellsConfig(seed=3),
    "solver": SolverConfig(plane_wave_order=1, k_mesh=4),
    "counts": CountsConfig(pretrain=5, train=4, validation=2, test=3),
}


def made(path, *, num_threads=2, overwrite=False, **settings):
    return generate(
        path,
        **{**SETTINGS, **settings},
        device=torch.device("cpu"),
        num_threads=num_threads,
        overwrite=overwrite,
        show_progress=False,
        say=lambda _: None,
    )


@pytest.fixture
def path(tmp_path):
    made(tmp_path / "cells.h5")
    return tmp_path / "cells.h5"


def test_what_is_written_is_read(path):
    file = read_cells(path)
    assert (file.cells, file.solver) == (SETTINGS["cells"], SETTINGS["solver"])
    assert {name: len(split) for name, split in file.splits.items()} == dataclasses.asdict(SETTINGS["counts"])
    assert file.splits["pretrain"].dos is None
    for number, name in enumerate(SPLITS):
        for index, cell in enumerate(file.splits[name].permittivity):
            assert (cell == make_cell(file.cells, split=number, index=index)).all()
    test = file.splits["test"]
    expected = labels_of(torch.from_numpy(test.permittivity), file.solver)
    # Single precision rounds otherwise in a batch; most at Γ, where the lowest frequency is a root of rounding.
    assert np.abs(test.dos - expected).max() < 5e-3
    assert len(np.unique(np.concatenate([s.permittivity for s in file.splits.values()]), axis=0)) == 14


def test_the_file_tells_its_units(path):
    with h5py.File(path) as file:
        assert np.array_equal(file["frequencies"], FREQUENCIES)
        assert file["test/dos"].attrs["units"] == "a √⟨ε⟩ / (2πc)"
        assert file["test/permittivity"].attrs["units"] == "1"
        assert all(file[name].attrs["description"] for name in ("frequencies", "test/dos"))


def test_the_content_depends_on_the_settings_alone(path, tmp_path):
    one = read_cells(path)
    assert made(tmp_path / "again.h5", num_threads=1).digest == one.digest
    more = made(tmp_path / "more.h5", counts=CountsConfig(pretrain=9, train=1, validation=0, test=3))
    assert more.digest != one.digest
    assert np.array_equal(more.splits["test"].dos, one.splits["test"].dos)
    assert np.array_equal(more.splits["pretrain"].permittivity[:5], one.splits["pretrain"].permittivity)


def test_the_same_cells_are_not_made_again_and_others_not_written_over(path):
    before = path.stat().st_mtime_ns
    made(path)
    assert path.stat().st_mtime_ns == before
    other = CellsConfig(seed=4)
    with pytest.raises(ConfigError, match=r"cells\.h5: holds cells of other settings; choose another file"):
        made(path, cells=other)
    assert made(path, cells=other, overwrite=True).cells == other
    assert read_cells(path).cells == other
    assert [entry.name for entry in path.parent.iterdir()] == ["cells.h5"]


def change(path, action):
    with h5py.File(path, "r+") as file:
        action(file)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda file: file.attrs.modify("format_version", 0), "of format version 0, this fast_essl reads 1"),
        (lambda file: file.attrs.pop("format"), "not a file of cells of fast_essl"),
        (
            lambda file: file["test/dos"].write_direct(np.zeros((3, 500), np.float32)),
            "damaged: test/dos is not",
        ),
        (lambda file: file.attrs.modify("cells", "{}"), "damaged: its settings or checksums were changed"),
        (lambda file: file["test/dos"].attrs.pop("sha256"), "damaged, or not an HDF5 file"),
        (lambda file: file.pop("train/dos"), "damaged: its settings or checksums"),
    ],
)
def test_a_changed_file_is_refused(path, action, message):
    change(path, action)
    with pytest.raises(DataError, match=rf"cells\.h5: {message}") as refused:
        read_cells(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["permittivity", "dos"])
def test_a_flipped_bit_is_found(path, name):
    array = getattr(read_cells(path).splits["test"], name)
    content = bytearray(path.read_bytes())
    content[content.index(array.tobytes()) + array.nbytes // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"cells\.h5: damaged: test/{name} is not what was written"
    ) as refused:
        read_cells(path)
    assert "\n" not in str(refused.value)


def test_a_damaged_head_is_found(path):
    path.write_bytes(bytes(60) + path.read_bytes()[60:])
    with pytest.raises(DataError, match=r"cells\.h5: damaged, or not an HDF5 file"):
        read_cells(path)


def test_a_truncated_file_and_one_that_is_none_are_refused(path):
    content = path.read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"no HDF5"):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"cells\.h5: damaged, or not an HDF5 file"):
            read_cells(path)
    with pytest.raises(DataError, match="no such file; make it with `fast-essl photonics generate`"):
        read_cells(path.parent / "none.h5")


def test_cells_below_one_are_refused_even_with_right_checksums(path, monkeypatch):
    monkeypatch.setattr(
        "fast_essl.photonics.generate.make_cell", lambda *_, **__: np.full((32, 32), 0.5, np.float32)
    )
    counts = CountsConfig(pretrain=2, train=0, validation=0, test=0)
    made(path, counts=counts, overwrite=True)
    with pytest.raises(DataError, match=r"pretrain/permittivity: must be .* numbers of 1 or more"):
        read_cells(path)
    with pytest.raises(ValueError, match="must be finite and 1 or more"):
        made(path, overwrite=True)
