"""The .beton file: stock FFCV reads it, no sample straddles a page, and damaged tables are refused."""

from pathlib import Path

import numpy as np
import pytest

from loaders import beton
from loaders.beton import IMAGE_JPEG, IMAGE_RAW, BetonWriter, read_tables
from loaders.convert.encode import to_jpeg
from loaders.errors import DataError


def write(path: Path, payloads: list[bytes], *, reserve: int = 0, mode: int = IMAGE_JPEG) -> Path:
    writer = BetonWriter(path, max_samples=len(payloads) + reserve, page_bytes=beton.MIN_PAGE_BYTES)
    for label, payload in enumerate(payloads):
        writer.add(mode, 7, 5, label, payload)
    writer.finish()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.beton", [b"one", b"three"], reserve=3)


def test_tables_return_what_was_written(small: Path) -> None:
    tables = read_tables(small)
    assert tables.num_samples == 2
    assert tables.modes.tolist() == [IMAGE_JPEG] * 2
    assert tables.widths.tolist() == [7, 7] and tables.heights.tolist() == [5, 5]
    assert tables.labels.tolist() == [0, 1] and tables.data_sizes.tolist() == [3, 5]
    data = small.read_bytes()
    ends = tables.data_ptrs + tables.data_sizes
    assert [data[a:b] for a, b in zip(tables.data_ptrs, ends, strict=True)] == [b"one", b"three"]


@pytest.mark.parametrize(
    ("sizes", "page_bytes"),
    [([900_000] * 5, 1 << 21), ([900_000, 900_000, 900_000, 5_000_000, 10, 1 << 21], 1 << 23)],
    ids=["small", "grows"],
)
def test_no_sample_straddles_a_page(tmp_path: Path, sizes: list[int], page_bytes: int) -> None:
    path = write(tmp_path / "pages.beton", [bytes([n]) * size for n, size in enumerate(sizes)])
    tables = read_tables(path)
    assert tables.page_size == page_bytes
    assert tables.data_sizes.tolist() == sizes
    last = tables.data_ptrs + tables.data_sizes - np.uint64(1)
    np.testing.assert_array_equal(tables.data_ptrs // page_bytes, last // page_bytes)
    data = np.fromfile(path, np.uint8)
    assert all(
        (data[a : b + 1] == n).all() for n, (a, b) in enumerate(zip(tables.data_ptrs, last, strict=True))
    )


def test_stock_ffcv_reads_pixels_and_labels(tmp_path: Path) -> None:
    """The process cache is the stricter of FFCV's two: it reads page by page."""
    ffcv_loader = pytest.importorskip("ffcv.loader")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.reader import Reader

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 256, 256, 3), dtype=np.uint8)  # 4.7 MB raw: three pages of 2 MiB
    path = tmp_path / "stock.beton"
    writer = BetonWriter(path, max_samples=40, page_bytes=beton.MIN_PAGE_BYTES)
    for index, image in enumerate(images):
        flat = np.full_like(image, 10 * index)
        if index % 2:
            writer.add(IMAGE_JPEG, 256, 256, index, to_jpeg(flat, 95))
        else:
            writer.add(IMAGE_RAW, 256, 256, index, image.tobytes())
    writer.finish()

    reader = Reader(str(path))
    assert reader.num_samples == 24 and reader.field_names == ["image", "label"]
    loader = ffcv_loader.Loader(
        str(path),
        batch_size=8,
        num_workers=1,
        os_cache=False,
        order=ffcv_loader.OrderOption.SEQUENTIAL,
        pipelines={"image": [CenterCropRGBImageDecoder((256, 256), 1.0)], "label": [IntDecoder()]},
    )
    seen = 0
    for pixels, labels in loader:
        for image, label in zip(pixels, labels[:, 0], strict=True):
            assert label == seen
            if seen % 2:
                assert abs(image.astype(int) - 10 * seen).max() <= 1
            else:
                np.testing.assert_array_equal(image, images[seen])
            seen += 1
    assert seen == 24


METADATA = beton.METADATA_START
DAMAGE = {
    "cut": (None, None, "cut short"),
    "version": (0, b"\x03\x00", "version is 3"),
    "fields": (24 + 1, b"picture", "fields are not"),
    "page": (4, b"\x01\x00\x00\x00", "page size of 1"),
    "count": (8, b"\xff" * 8, "do not fit"),
    "mode": (METADATA, b"\x02", "sample 0 has an image mode"),
    "width": (METADATA + 24 + 1, b"\x00\x00", "sample 1 has no width"),
    "pointer": (METADATA + 24 + 5, b"\xff" * 8, "sample 1 has two different addresses"),
    "label": (METADATA + 16, b"\xff" * 8, "sample 0 has a negative label"),
    "size": (-8, b"\xff" * 8, "sample 1 reaches outside"),
    "id": (-24, b"\x07", "does not list every sample once"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tables_are_refused(small: Path, kind: str) -> None:
    position, new, message = DAMAGE[kind]
    data = bytearray(small.read_bytes())
    if position is None or new is None:
        del data[-1:]
    else:
        position %= len(data)
        data[position : position + len(new)] = new
    small.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_tables(small)
    assert str(small) in str(caught.value) and "\n" not in str(caught.value)


def test_pointer_outside_the_file_in_both_tables_is_refused(small: Path) -> None:
    data = bytearray(small.read_bytes())
    outside = (1 << 40).to_bytes(8, "little")
    data[METADATA + 24 + 5 : METADATA + 24 + 13] = outside
    data[-16:-8] = outside
    small.write_bytes(data)
    with pytest.raises(DataError, match="sample 1 points outside"):
        read_tables(small)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG" + bytes(3000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"other\.beton"):
        read_tables(path)


def test_raw_size_must_match_the_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 0 is raw"):
        read_tables(write(tmp_path / "raw.beton", [b"x" * 104], mode=IMAGE_RAW))
