"""The compiled decode, crop and resize against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from support import photograph

from loaders.cut import cut_batch, decode_jpeg, resize_crop

FILTERS = {0: Image.Resampling.BILINEAR, 1: Image.Resampling.BICUBIC}


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options", [{"quality": 92}, {"quality": 75, "subsampling": 0}, {"progressive": True}]
)
@pytest.mark.parametrize("size", [(61, 83), (8, 8), (1, 17)])
def test_decoding_equals_pillow_bit_for_bit(options, size):
    data = jpeg(photograph(3, *size), **options)
    pixels = np.full((*size, 3), 77, np.uint8)
    assert decode_jpeg(np.frombuffer(data, np.uint8), pixels) == 0
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_damage_and_a_wrong_size_give_a_status():
    data = np.frombuffer(jpeg(photograph(4, 60, 80), quality=92), np.uint8)
    pixels = np.empty((60, 80, 3), np.uint8)
    assert decode_jpeg(data[: len(data) // 2], pixels) != 0
    assert decode_jpeg(data[:5], pixels) != 0
    assert decode_jpeg(np.zeros(100, np.uint8), pixels) != 0
    assert decode_jpeg(data, np.empty((60, 81, 3), np.uint8)) != 0
    damaged = data.copy()
    damaged[len(data) // 2 : len(data) // 2 + 40] = 0xFF
    assert decode_jpeg(damaged, pixels) != 0
    assert decode_jpeg(data, pixels) == 0


def _compare(image, box, cubic, size):
    top, left, height, width = box
    out = np.full((size, size, 3), 77, np.uint8)
    resize_crop(np.asarray(image), np.array(box), cubic, out)
    crop = image.crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((size, size), FILTERS[cubic]))
    return np.abs(out.astype(int) - expected)


@pytest.mark.parametrize("cubic", [0, 1])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 96])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 90, 120), (3, 5, 40, 31), (88, 118, 2, 2), (50, 0, 1, 120), (10, 20, 16, 16), (0, 60, 90, 1)],
)
def test_crops_equal_pillow_s(cubic, size, box):
    """Within one level where Pillow's rounding between its passes cannot pile up, and on average far below it."""
    difference = _compare(photograph(5, 90, 120), box, cubic, size)
    assert difference.mean() <= 0.5
    assert difference.max() <= 2


def test_a_box_of_the_target_s_size_is_copied():
    assert _compare(photograph(6, 50, 50), (7, 11, 32, 32), 1, 32).max() == 0


def test_nothing_outside_the_box_leaks_in():
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:20, 10:20] = 200
    out = np.empty((25, 25, 3), np.uint8)
    resize_crop(image, np.array([10, 10, 10, 10]), 1, out)
    assert (out == 200).all()


def test_photographs_within_a_level_of_pillow(shared_photos):
    """The wanted tolerance on real photographs: a mean absolute difference of at most one level a crop."""
    random = np.random.default_rng(0)
    for path in sorted(shared_photos.rglob("*.*"))[::12]:
        image = Image.open(path).convert("RGB")
        height, width = (int(random.integers(side // 3, side + 1)) for side in (image.height, image.width))
        top, left = (
            int(random.integers(image.height - height + 1)),
            int(random.integers(image.width - width + 1)),
        )
        for cubic, size in ((1, 224), (0, 96)):
            assert _compare(image, (top, left, height, width), cubic, size).mean() <= 1.0, path


def test_no_thread_compiles_the_loop_of_the_loader():
    assert len(cut_batch.signatures) == 1
    with pytest.raises(TypeError, match="No matching definition"):
        cut_batch(0, np.zeros((1, 5), np.int32), (), np.ones(1), np.zeros(1), np.zeros((1, 3)), np.zeros(1))
