"""Unit cells: reproducible, of two materials, with the symmetries they are to have and no others."""

from __future__ import annotations

import numpy as np
import pytest

from fast_essl.photonics.cells import SIDE, CellsConfig, make_cell


def cells(num=40, split=0, **settings):
    config = CellsConfig(**settings)
    return np.stack([make_cell(config, split=split, index=index) for index in range(num)])


@pytest.mark.parametrize("settings", [{}, {"symmetry": "square"}, {"kind": "gpm"}, {"max_order": 3}])
def test_a_cell_has_two_permittivities_in_the_range_and_the_drawn_fill(settings):
    images = cells(permittivity=(2.0, 12.0), fill=(0.3, 0.7), **settings)
    assert images.shape == (40, SIDE, SIDE) and images.dtype == np.float32
    assert images.min() >= 2 and images.max() <= 12
    for image in images:
        values, counts = np.unique(image, return_counts=True)
        assert len(values) == 2 and 0.28 < counts[0] / SIDE**2 < 0.72
    materials = np.array([np.unique(image) for image in images])
    assert materials.std() > 2  # not all the same
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


def test_a_cell_depends_on_seed_split_and_index_alone():
    config = CellsConfig()
    many = cells(8)
    assert (make_cell(config, split=0, index=5) == many[5]).all()
    assert (cells(8) == many).all()
    for other in (cells(8, split=1), cells(8, seed=1)):
        assert (other != many).any(axis=(1, 2)).all()


def test_square_cells_have_the_square_s_symmetry_to_the_last_pixel():
    for image in cells(symmetry="square", max_order=3):
        for moved in (np.rot90(image), np.fliplr(image), image.T):
            assert (moved == image).all()


def test_gpm_cells_have_their_mirror_line_and_nothing_more():
    images = cells(kind="gpm")
    assert (images == images[:, :, ::-1]).all()
    assert all((image != np.flipud(image)).any() and (image != np.rot90(image)).any() for image in images)


def test_blobs_are_in_the_middle_and_the_cells_of_the_other_choice_anywhere():
    middle = SIDE // 2

    def share_inside(images):
        """Of the cells, whose middle pixel is of the material that the fill of 20% is made of."""
        inside = [
            image[middle, middle] == min(np.unique(image), key=lambda v: (image == v).sum())
            for image in images
        ]
        return np.mean(inside)

    assert share_inside(cells(fill=(0.2, 0.2))) == 1
    assert share_inside(cells(fill=(0.2, 0.2), centred=False)) < 0.5


def test_plain_blobs_have_no_symmetry():
    for image in cells(20):
        for moved in (np.rot90(image, 2), np.fliplr(image), image.T):
            assert (moved != image).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"permittivity": (0.5, 20.0)}, r"permittivity = \(0.5, 20.0\): must be two numbers, 1 <= low"),
        ({"permittivity": (1.0, 30.0)}, "permittivity"),
        ({"fill": (0.0, 0.5)}, "fill"),
        ({"max_order": 0}, "max_order = 0: must be from 1 to 4"),
        ({"kind": "gpm", "symmetry": "square"}, "symmetry = 'square': must be 'none' for gpm"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CellsConfig(**settings)
