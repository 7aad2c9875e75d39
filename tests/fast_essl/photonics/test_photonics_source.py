"""Views of cells: permutations of their pixels by words that depend on nothing but (seed, epoch, cell, view)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import assert_close, parity

from fast_essl.config import ConfigError, TransformationConfig
from fast_essl.photonics.cells import CellsConfig, make_cell
from fast_essl.photonics.config import AugmentationConfig, PhotonicsConfig
from fast_essl.photonics.solver import SolverConfig
from fast_essl.photonics.source import (
    CellLoader,
    as_images,
    augmented,
    cell_source,
    cell_transformations,
    draw_words,
)
from fast_essl.photonics.store import CellFile, Split
from fast_essl.transformations import build_transformation

CELLS = torch.arange(40 * 1024, dtype=torch.float32).view(40, 32, 32)
NOTHING = AugmentationConfig(flips=False, rotations=False, translations=False)


def words(num=40, view=0, seed=0, epoch=0):
    return draw_words(seed, epoch, np.arange(num), range(view, view + 1))[:, 0]


def elements(moved, candidates):
    """Of each cell, which of the candidates it became."""
    same = torch.stack([(moved == candidate).all(dim=(1, 2)) for candidate in candidates])
    assert (same.sum(0) == 1).all()
    return same.int().argmax(0)


@pytest.mark.parametrize(
    ("name", "copies", "labels"),
    [
        ("four_fold_rotation", "rot4", "rot4_labels"),
        ("cyclic_translations", "trans", "trans_labels"),
        ("four_flips", "flip", "flip_labels"),
    ],
)
def test_the_copies_are_the_official_release_s(name, copies, labels):
    reference = parity("photonics_transformations")
    transformation = build_transformation(name, size=32)
    images = torch.from_numpy(reference["images"])
    assert_close(transformation.copies(images), reference[copies])
    assert transformation.labels(len(images)).tolist() == reference[labels].tolist()


def test_flips_turns_and_translations_are_as_likely_as_they_should_be():
    flips = [CELLS, CELLS.flip(1), CELLS.flip(2)]
    turns = [torch.rot90(CELLS, k, (1, 2)) for k in range(4)]
    for field, candidates in (("flips", flips), ("rotations", turns)):
        moved = augmented(CELLS, words(), dataclasses.replace(NOTHING, **{field: True}))
        counts = torch.bincount(elements(moved, candidates), minlength=len(candidates))
        assert counts.min() >= 5 and counts.sum() == 40
    moved = augmented(CELLS, words(), dataclasses.replace(NOTHING, translations=True))
    shifts = [
        int((cell == original[0, 0]).flatten().nonzero()) for cell, original in zip(moved, CELLS, strict=True)
    ]
    expected = [
        torch.roll(cell, divmod(shift, 32), (0, 1)) for cell, shift in zip(CELLS, shifts, strict=True)
    ]
    assert torch.equal(moved, torch.stack(expected)) and len(set(shifts)) > 30


def test_all_together_are_done_one_after_the_other():
    drawn = words()
    step = CELLS
    for field in ("flips", "rotations", "translations"):
        step = augmented(step, drawn, dataclasses.replace(NOTHING, **{field: True}))
    half = build_transformation("cyclic_translations", size=32)
    step = half.one_each(step[:, None], half.drawn_labels(drawn[:, 3]))[:, 0]
    assert torch.equal(augmented(CELLS, drawn, AugmentationConfig(translations=True), half), step)
    assert torch.equal(augmented(CELLS, drawn, NOTHING), CELLS)


def test_words_depend_on_seed_epoch_cell_and_view_alone():
    many = draw_words(1, 2, np.arange(9), range(2))
    assert np.array_equal(draw_words(1, 2, np.array([7, 3]), range(1, 2))[:, 0], many[[7, 3], 1])
    for other in (
        draw_words(0, 2, np.arange(9), range(2)),
        draw_words(1, 3, np.arange(9), range(2)),
        many[:, ::-1],
    ):
        assert (other != many).mean() > 0.99


def file(num=20):
    cells = np.stack([make_cell(CellsConfig(), split=0, index=index) for index in range(num)])
    return CellFile(
        cells=CellsConfig(),
        solver=SolverConfig(),
        splits={"pretrain": Split(permittivity=cells, dos=None)},
        digest="",
    )


def config(**fields):
    base = PhotonicsConfig(data={"file": "none.h5"})
    train = dataclasses.replace(base.train, batch_size=8)
    return dataclasses.replace(base, train=train, **fields)


def test_the_loader_goes_through_all_cells_and_takes_up_an_epoch_anywhere():
    loader = CellLoader(file().splits["pretrain"].permittivity, batch_size=8, seed=1)
    batches = list(loader.epoch(3))
    assert len(batches) == len(loader) == 2
    assert len(set(torch.cat([batch.indices for batch in batches]).tolist())) == 16
    resumed = next(loader.epoch(3, start_step=1))
    assert torch.equal(resumed.images[0], batches[1].images[0]) and (resumed.words == batches[1].words).all()
    assert not torch.equal(batches[0].indices, next(loader.epoch(4)).indices)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 21: must be at most the 20 cells"):
        CellLoader(file().splits["pretrain"].permittivity, batch_size=21, seed=1)


def test_a_source_makes_two_views_and_all_copies():
    source = cell_source(config(), file(), torch.float32)
    batch = next(source.loader.epoch(0))
    views = source.make_views(batch)
    assert [tuple(view.shape) for view in views.views] == [(8, 1, 32, 32)] * 2
    assert not torch.equal(*views.views)
    levels = as_images(batch.images[0])
    assert levels.min() >= 0 and levels.max() <= 1
    assert torch.equal(views.transformed[:8], levels)
    assert torch.equal(views.transformed[24:], levels.roll((16, 16), (2, 3)))
    assert views.transformed_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8


def test_the_poor_baseline_s_views_are_moved_by_half_periods_and_it_has_no_copies():
    plain = dataclasses.replace(config().method, equivariance_weight=0.0)
    chosen = TransformationConfig(equivariance="cyclic_translations", invariance="cyclic_translations")
    augmentation = NOTHING
    source = cell_source(
        config(method=plain, transformation=chosen, augmentation=augmentation), file(), torch.float32
    )
    batch = next(source.loader.epoch(0))
    views = source.make_views(batch)
    assert views.transformed is None
    levels = as_images(batch.images[0])[:, 0]
    halves = [levels.roll((down, right), (1, 2)) for down in (0, 16) for right in (0, 16)]
    assert len(set(elements(views.views[0][:, 0], halves).tolist())) > 1


def test_transformations_that_change_permittivities_are_refused():
    for name in ("grayscale", "colour_inversion", "gaussian_blur"):
        with pytest.raises(
            ConfigError, match=r"transformation.equivariance: transformation .* changes permitt"
        ):
            cell_transformations(TransformationConfig(equivariance=name), 1.0)
    with pytest.raises(ConfigError, match=r"transformation.invariance: transformation 'spin' is unknown"):
        cell_transformations(TransformationConfig(invariance="spin"), 0.0)
    assert cell_transformations(TransformationConfig(equivariance="grayscale"), 0.0) == (None, None)
