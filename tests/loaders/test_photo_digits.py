"""photo-digits: disjoint halves, the same images every time, and harder than plain digits."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import IMAGE_JPEG, read_tables
from loaders.convert import convert
from loaders.convert.photo_digits import open_photo_digits, split_digits, split_photos
from loaders.errors import DataError

pytest.importorskip("sklearn")


def test_default_sizes_and_labels(tmp_path: Path) -> None:
    manifest = convert("photo-digits", tmp_path / "test.beton", split="test", workers=1, progress=False)
    assert manifest.num_samples == 1000 and open_photo_digits("train").num_samples == 4000
    assert manifest.class_names == tuple("0123456789")
    assert manifest.class_counts == (100,) * 10
    assert manifest.storage == {"copied": 1000, "jpeg": 0, "raw": 0}
    tables = read_tables(tmp_path / "test.beton")
    assert set(tables.modes) == {IMAGE_JPEG} and set(tables.widths) == set(tables.heights) == {32}


def test_splits_share_no_digit_and_no_photo_region() -> None:
    from sklearn import datasets

    train, test = (
        [digit.tobytes() for own in split_digits(split, 0) for digit in own] for split in ("train", "test")
    )
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(digit.tobytes() for digit in datasets.load_digits().images)
    assert len(train) == pytest.approx(4 * len(test), rel=0.02)
    whole = datasets.load_sample_images().images
    for left, right, photo in zip(split_photos("train"), split_photos("test"), whole, strict=True):
        np.testing.assert_array_equal(np.hstack([left, right]), photo)
        assert min(left.shape[1], right.shape[1]) >= 32


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    few = list(open_photo_digits("train", num_samples=3).samples())
    assert few == list(open_photo_digits("train", num_samples=5).samples())[:3]
    other = list(open_photo_digits("train", num_samples=3, seed=1).samples())
    assert all(a.image != b.image for a, b in zip(few, other, strict=True))


def test_the_digit_is_the_difference_from_the_photograph() -> None:
    """On black the blend would be the digit itself; here most pixels off the stroke are the photograph's."""
    from loaders.convert import photo_digits

    digit = np.zeros((8, 8))
    digit[2:6, 3:5] = 16
    black = np.zeros((32, 32, 3), np.uint8)
    grey = np.full((32, 32, 3), 100, np.uint8)
    on_black, on_grey = (
        photo_digits._blend(digit, patch, np.random.Generator(np.random.Philox(3))).astype(int)
        for patch in (black, grey)
    )
    np.testing.assert_array_equal(on_grey, np.abs(100 - on_black))
    assert on_black.max() > 200 and (on_black == 0).mean() > 0.3


def test_patches_are_textured() -> None:
    """A region half flat, half noise: only patches that reach into the noise are taken."""
    from loaders.convert import photo_digits

    region = np.zeros((32, 400, 3), np.uint8)
    region[:, 200:] = np.random.default_rng(0).integers(0, 256, (32, 200, 3))
    chance = np.random.Generator(np.random.Philox(3))
    patches = [photo_digits._textured_patch([region], chance) for _ in range(50)]
    assert all(patch.shape == (32, 32, 3) and patch.std() > 0 for patch in patches)


def test_labels_follow_the_digits() -> None:
    from sklearn import datasets

    whole = datasets.load_digits()
    label_of = {digit.tobytes(): label for digit, label in zip(whole.images, whole.target, strict=True)}
    for label, own in enumerate(split_digits("test", 0)):
        assert {label_of[digit.tobytes()] for digit in own} == {label}
    samples = list(open_photo_digits("train", num_samples=25).samples())
    assert [sample.label for sample in samples] == [*range(10), *range(10), *range(5)]
    first = Image.open(io.BytesIO(samples[0].image))  # type: ignore[arg-type]
    assert first.size == (32, 32) and first.mode == "RGB"


def test_unknown_split() -> None:
    with pytest.raises(DataError, match="photo-digits: has no split 'val'; give one of train, test"):
        open_photo_digits("val")
