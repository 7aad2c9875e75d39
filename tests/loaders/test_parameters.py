"""The draw of the random choices: the generator against published vectors, the draw against an obvious one."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from loaders.parameters import draw_parameters, philox
from loaders.recipe import Recipe

RECIPES = (
    Recipe(size=32, scale=(0.08, 1.0), blur_p=0.5, solarize_p=0.2),
    Recipe(size=16, scale=(0.05, 0.14), hue=0.0, brightness=0.0),
)


def draw(indices, recipes=RECIPES, seed=7, epoch=3, height=75, width=100):
    count = len(indices)
    return draw_parameters(
        recipes,
        seed=seed,
        epoch=epoch,
        indices=np.asarray(indices),
        heights=np.full(count, height),
        widths=np.full(count, width),
    )


def tables_equal(one, other):
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(key, counter, words):
    """The known-answer vectors of Random123 (Salmon et al., SC 2011) for philox4x32-10."""
    assert tuple(int(word) for word in philox(np.uint64(key), *map(np.uint32, counter))) == words


def test_a_row_depends_on_its_own_index_alone():
    whole = draw(range(200))
    assert tables_equal(whole.rows(np.array([17, 150, 3])), draw([17, 150, 3]))
    assert tables_equal(
        draw(range(200), recipes=RECIPES[:1]),
        whole.rows(slice(None)).__class__(
            **{field.name: getattr(whole, field.name)[:, :1] for field in fields(whole)}
        ),
    )


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 4}])
def test_seed_and_epoch_change_every_column(change):
    one, other = draw(range(500)), draw(range(500), **change)
    for field in fields(one):
        assert not np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_views_are_drawn_apart():
    table = draw(range(500), recipes=(RECIPES[0], RECIPES[0]))
    assert (table.box[:, 0] != table.box[:, 1]).any(axis=1).mean() > 0.99


def test_frequencies_and_ranges_are_the_recipe_s():
    count = 20_000
    table = draw(range(count))
    first = table.view(0)
    tolerance = 4 * math.sqrt(0.25 / count)
    assert abs(first.flip.mean() - 0.5) < tolerance
    assert abs(first.grey.mean() - 0.2) < tolerance
    assert abs((first.blur_sigma > 0).mean() - 0.5) < tolerance
    assert abs(first.solarize.mean() - 0.2) < tolerance
    jittered = (first.jitter != np.array([1, 1, 1, 0], np.float32)).any(axis=1)
    assert abs(jittered.mean() - 0.8) < tolerance
    factors = first.jitter[jittered]
    for op, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low <= factors[:, op].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factors[:, op].max() <= high
    sigma = first.blur_sigma[first.blur_sigma > 0]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0
    orders, counts = np.unique(first.jitter_order, axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 0.8 * count / 24
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    # Four elements, as a transformation draws them: each a quarter.
    elements = first.element_word.astype(np.int64) * 4 >> 32
    assert np.abs(np.bincount(elements) / count - 0.25).max() < tolerance
    second = table.view(1)
    assert (second.jitter[:, 0] == 1).all() and (second.jitter[:, 3] == 0).all()


def test_boxes_lie_inside_and_have_the_recipe_s_area_and_ratio():
    table = draw(range(20_000), height=375, width=500)
    for view, recipe in enumerate(RECIPES):
        top, left, height, width = table.box[:, view].T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + height <= 375).all() and (left + width <= 500).all()
        share, ratio = height * width / (375 * 500), width / height
        assert share.min() > recipe.scale[0] - 0.002 and share.max() < recipe.scale[1] + 0.002
        assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert table.box[:, 1, 0].min() == 0
    bottom = (table.box[:, 1, 0] + table.box[:, 1, 2]).max()
    assert bottom == 375


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))]
)
def test_an_image_too_narrow_for_any_attempt_gives_the_centred_box(height, width, box):
    recipe = Recipe(size=32, scale=(0.99, 1.0))
    table = draw(range(5), recipes=(recipe,), height=height, width=width)
    assert (table.box[:, 0] == box).all()


def test_evaluation_is_the_centred_square_and_nothing_else():
    recipe = Recipe.evaluation(224, 224 / 256)
    table = draw(range(3), recipes=(recipe,), height=300, width=512)
    assert (table.box[:, 0] == (19, 125, 262, 262)).all()
    assert (
        not table.flip.any()
        and not table.grey.any()
        and not table.blur_sigma.any()
        and not table.solarize.any()
    )
    assert (table.jitter[:, 0] == (1, 1, 1, 0)).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("scale", (0.5, 0.2)),
        ("hue", 0.6),
        ("flip_p", 1.5),
        ("brightness", -1.0),
        ("std", (0.0, 1.0, 1.0)),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        replace(RECIPES[0], **{field: value})
