"""The rooms do what they say: photographs like photographs, pages in and out of memory, rows from known work."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fast_essl.bench import loading, storage, synthetic
from fast_essl.bench.measuring import Marks, Row, measure, summary, timed
from fast_essl.bench.table import describe_kernels, duration, number, table_head, table_line
from loaders.images import open_beton
from loaders.recipe import Recipe
from loaders.torch_loader import pillow_crop

CPU = torch.device("cpu")


def jpeg_bytes(picture: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=synthetic.QUALITY, subsampling=0)
    return file.tell()


def test_photographs_have_the_size_and_the_spectrum_of_photographs() -> None:
    pictures = [synthetic.photograph(number, 500, 375) for number in range(12)]
    sizes = [jpeg_bytes(picture) for picture in pictures]
    assert 90_000 < np.mean(sizes) < 130_000
    assert np.std(sizes) > 10_000
    slopes = []
    for picture in pictures:
        grey = picture.mean(axis=2)
        amplitude = np.abs(np.fft.fft2(grey - grey.mean()))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(375), np.fft.fftfreq(500), indexing="ij"))
        chosen = (frequency > 0.01) & (frequency < 0.3)
        slopes.append(np.polyfit(np.log(frequency[chosen]), np.log(amplitude[chosen]), 1)[0])
    # White noise has 0; photographs of ImageNet -1.2 with a deviation of 0.25 from one to the next.
    assert -1.7 < np.mean(slopes) < -0.9


def test_a_photograph_is_the_same_each_time_and_another_for_another_seed() -> None:
    one = synthetic.photograph(3, 60, 40)
    assert one.shape == (40, 60, 3)
    np.testing.assert_array_equal(one, synthetic.photograph(3, 60, 40))
    assert (one != synthetic.photograph(4, 60, 40)).any()


def test_crops_made_for_a_step_have_the_recipes_sizes() -> None:
    crops = synthetic.make_crops((Recipe(size=32), Recipe(size=16)), 5, epoch=2)
    assert [tuple(image.shape) for image in crops.images] == [(5, 32, 32, 3), (5, 16, 16, 3)]
    assert crops.parameters.box.shape == (5, 2, 4)
    assert len(crops.labels) == 5


def test_pages_are_read_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(3 << 20))
    spans = [(10_000, 5_000), (2_500_000, 90_000)]
    assert storage.resident_share(path, [(0, 3 << 20)]) == 1
    if not storage.drop_from_memory(path, spans):
        pytest.skip("this file system keeps its files in memory")
    assert storage.resident_share(path, spans) < 0.05
    storage.read_spans(path, spans, num_threads=2)
    assert storage.resident_share(path, spans) == 1
    with pytest.raises(OSError, match="ends early"):
        storage.read_spans(path, [(0, 4 << 20)], num_threads=1)


def test_all_samples_are_decoded_and_a_damaged_one_is_counted(photo_beton: Path) -> None:
    images = open_beton(photo_beton)
    indices = loading.choose(images, 20, jpeg_only=True)
    assert len(set(indices.tolist())) == 20
    stored = loading.load_stored(images, indices)
    tables = (stored.starts, stored.sizes, stored.heights, stored.widths)
    assert loading.decode_all(stored.data, *tables) == 0
    broken = stored.data.copy()
    broken[stored.starts[7] + 200 : stored.starts[7] + 260] = 255
    assert loading.decode_all(broken, *tables) == 1
    assert len(loading.choose(images, 1000)) == images.tables.num_samples


def test_the_crops_row_does_the_work_of_the_recipes(
    photo_beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_beton(photo_beton)
    recipes = (Recipe(size=24), Recipe(size=12, interpolation="bilinear"))
    indices = loading.choose(images, 6)
    seen = []

    def crop_all(pixels, starts, heights, widths, boxes, sizes, cubic):  # type: ignore[no-untyped-def]
        for n, index in enumerate(indices):
            decoded = pixels[starts[n] : starts[n] + 3 * heights[n] * widths[n]]
            decoded = decoded.reshape(heights[n], widths[n], 3)
            expected = np.asarray(images.image(int(index)))
            np.testing.assert_array_equal(decoded, expected)
            seen.append(pillow_crop(Image.fromarray(decoded), boxes[n, 0], recipes[0]).shape)
        assert (sizes.tolist(), cubic.tolist()) == ([24, 12], [1, 0])

    monkeypatch.setattr(loading, "crop_all", crop_all)
    row = loading.crops_row(images, indices, recipes, num_threads=1, num_repeats=2)
    assert seen == [(24, 24, 3)] * 6 * 3
    assert row.bytes_per_sample == 3 * (24**2 + 12**2)


def test_a_row_keeps_the_first_time_apart() -> None:
    naps = iter([0.2, 0.02, 0.03, 0.04])
    prepared = []

    def work() -> int:
        time.sleep(next(naps))
        return 10

    row = measure(
        "naps",
        work,
        batch_size=5,
        num_repeats=3,
        bytes_per_sample=1e6,
        opening_s=1.0,
        prepare=lambda: prepared.append(0),
    )
    assert (row.batch_ms["n"], len(prepared)) == (3, 4)
    # Half of each nap a batch of five, and never less than it slept.
    assert row.batch_ms["min"] >= 10
    assert row.batch_ms["median"] >= 15
    assert row.batch_ms["max"] >= 20
    assert row.setup_s > 1.1
    assert row.samples_per_s == pytest.approx(5000 / row.batch_ms["median"])
    assert row.mb_per_s == pytest.approx(row.samples_per_s)
    assert "tflop_per_s" not in row.to_table()
    assert row.to_table()["samples_per_s"] == row.samples_per_s


def test_marks_and_timings_are_of_what_lies_between() -> None:
    marks = Marks(CPU)
    for nap in (0.0, 0.02, 0.01):
        time.sleep(nap)
        marks.mark()
    first, second = marks.between_ms()
    assert first >= 20
    assert second >= 10
    assert timed(lambda: time.sleep(0.01), CPU) >= 10
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


def test_the_table_shows_rates_and_leaves_out_what_was_not_measured() -> None:
    row = Row(
        name="loader",
        batch_size=64,
        batch_ms={"median": 100.0, "min": 80.0, "max": 128.0, "n": 5},
        bytes_per_sample=112_000.0,
        tflop_per_s=1.5,
    )
    assert table_line(row, on_gpu=False).split() == [
        "loader",
        "64",
        "640",
        "500",
        "–",
        "800",
        "100",
        "71.7",
        "0.00",
    ]
    assert "1.50" in table_line(row, on_gpu=True)
    assert "TFLOP/s" not in table_head(on_gpu=False)
    assert len(table_head(on_gpu=True)) == len(table_line(row, on_gpu=True))
    assert [number(value) for value in (1234.5, 12.34, 0.123, None)] == ["1,234", "12.3", "0.12", ""]
    assert [duration(s) for s in (5, 600, 9000, 200_000)] == [
        "5.0 seconds",
        "10.0 minutes",
        "2.5 hours",
        "2.3 days",
    ]


def test_the_kernels_table_tells_the_ratio_to_eager() -> None:
    def row(median: float) -> dict[str, float]:
        return {"median": median, "min": median, "max": median, "n": 3, "peak_mib": 7.0}

    text = describe_kernels({"head": {"eager": row(3.0), "triton": row(1.5)}})
    assert text.splitlines()[2].split() == ["head,", "triton", "1.500", "1.500", "–", "1.500", "2.00", "7"]
