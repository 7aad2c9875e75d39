"""What is stored of one image: JPEG streams that fit byte for byte, everything else as 8-bit RGB."""

import io
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features

from loaders import image_file, jpeg
from loaders.beton import IMAGE_JPEG, IMAGE_RAW
from loaders.convert import convert
from loaders.convert import encode as encode_module
from loaders.convert.encode import BadImage, Encoded, EncodeOptions, encode_sample
from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.images import open_beton
from loaders.manifest import check_opening, verify

AUTO = EncodeOptions(max_side=None, quality=90, encoding="auto")
RAW = EncodeOptions(max_side=None, quality=90, encoding="raw")


def photo(width: int = 96, height: int = 80) -> npt.NDArray[np.uint8]:
    """A smooth picture whose four corners differ in colour, as JPEG likes it."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode(image: bytes | npt.NDArray[np.uint8], options: EncodeOptions = AUTO) -> Encoded:
    result = encode_sample(Sample("it", 0, image), options)
    assert isinstance(result, Encoded), result
    return result


def refuse(image: bytes | Path) -> str:
    result = encode_sample(Sample("it", 0, image), AUTO)
    assert isinstance(result, BadImage)
    assert "\n" not in result.reason
    return result.reason


def pixels(encoded: Encoded) -> npt.NDArray[np.uint8]:
    if encoded.mode == IMAGE_RAW:
        return np.frombuffer(encoded.payload, np.uint8).reshape(encoded.height, encoded.width, 3)
    image = Image.open(io.BytesIO(encoded.payload))
    assert image.mode == "RGB" and image.size == (encoded.width, encoded.height)
    return np.asarray(image)


def mean_difference(encoded: Encoded, expected: npt.NDArray[np.uint8]) -> float:
    assert pixels(encoded).shape == expected.shape
    return float(np.abs(pixels(encoded).astype(int) - expected).mean())


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("side", [32, 96])
def test_plain_jpeg_is_stored_byte_for_byte(subsampling: str, side: int) -> None:
    data = save(Image.fromarray(photo(side, side)), "JPEG", quality=71, subsampling=subsampling)
    assert encode(data) == Encoded(IMAGE_JPEG, side, side, data, True)


def test_jpeg_at_max_side_is_copied_and_a_larger_one_is_not() -> None:
    data = save(Image.fromarray(photo(96, 80)), "JPEG")
    assert encode(data, EncodeOptions(max_side=96, quality=90, encoding="auto")).copied
    smaller = encode(data, EncodeOptions(max_side=72, quality=90, encoding="auto"))
    assert not smaller.copied and smaller.mode == IMAGE_JPEG and (smaller.width, smaller.height) == (72, 60)
    expected = Image.fromarray(photo(96, 80)).resize((72, 60), Image.Resampling.LANCZOS)
    assert mean_difference(smaller, np.asarray(expected)) < 3


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"exif": {0x0112: 6}}], ids=["progressive", "exif"]
)
def test_other_jpegs_are_encoded_again(options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif.update(options.pop("exif", {}))  # type: ignore[call-overload]
    upright = np.rot90(photo(), -1) if exif else photo()
    encoded = encode(save(Image.fromarray(photo()), "JPEG", quality=95, exif=exif, **options))
    frame = jpeg.read_frame(encoded.payload)
    assert not encoded.copied and frame is not None and frame.process == 0
    assert mean_difference(encoded, upright) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: photo(), 2: photo()[:, ::-1], 3: photo()[::-1, ::-1], 4: photo()[::-1],
        5: photo().swapaxes(0, 1), 6: np.rot90(photo(), -1),
        7: photo()[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(photo()),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(
        pixels(encode(save(Image.fromarray(photo()), "PNG", exif=exif), RAW)), turned
    )


GREY = photo()[:, :, 0]
MODES = {
    "grey": (save(Image.fromarray(GREY), "PNG"), np.dstack([GREY] * 3)),
    "grey-alpha": (save(Image.fromarray(GREY).convert("LA"), "PNG"), np.dstack([GREY] * 3)),
    "one-bit": (save(Image.fromarray(GREY > 99), "PNG"), np.dstack([(GREY > 99) * np.uint8(255)] * 3)),
    "alpha": (save(Image.fromarray(photo()).convert("RGBA"), "PNG"), photo()),
    "palette": (
        save(Image.fromarray(photo()).quantize(16), "PNG"),
        np.asarray(Image.fromarray(photo()).quantize(16).convert("RGB")),
    ),
    "gif": (
        save(Image.fromarray(photo()).quantize(16), "GIF"),
        np.asarray(Image.fromarray(photo()).quantize(16).convert("RGB")),
    ),
    "16-bit-png": (save(Image.fromarray(GREY.astype(np.uint16) << 8), "PNG"), np.dstack([GREY] * 3)),
    "16-bit-tiff": (save(Image.fromarray(GREY.astype(np.uint16) << 8), "TIFF"), np.dstack([GREY] * 3)),
    "16-bit-pgm": (
        b"P5 96 80 65535\n" + (GREY.astype(">u2") << 8).astype(">u2").tobytes(),
        np.dstack([GREY] * 3),
    ),
    "cmyk": (save(Image.fromarray(photo()).convert("CMYK"), "TIFF"), photo()),
    "webp": (save(Image.fromarray(photo()), "WEBP", lossless=True), photo()),
    "bmp": (save(Image.fromarray(photo()), "BMP"), photo()),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    data, expected = MODES[mode]
    np.testing.assert_array_equal(pixels(encode(data, RAW)), expected)
    stored = encode(data)
    assert stored.mode == IMAGE_JPEG and not stored.copied
    assert mean_difference(stored, expected) < (9 if mode in ("palette", "gif", "one-bit") else 3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode: str) -> None:
    encoded = encode(save(Image.fromarray(photo()).convert(mode), "JPEG", quality=95))
    assert encoded.mode == IMAGE_JPEG and not encoded.copied
    expected = np.asarray(Image.fromarray(photo()).convert(mode).convert("RGB"))
    assert mean_difference(encoded, expected) < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_small_lossless_images_lose_nothing(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    encoded = encode(save(Image.fromarray(noise), kind, lossless=True))
    assert encoded.mode == IMAGE_RAW
    np.testing.assert_array_equal(pixels(encoded), noise)
    forced = encode(noise, EncodeOptions(max_side=None, quality=90, encoding="jpeg"))
    assert forced.mode == IMAGE_JPEG and mean_difference(forced, noise) > 1


def test_sixty_four_pixels_are_small_and_sixty_five_are_not() -> None:
    assert encode(photo(64, 10)).mode == IMAGE_RAW
    assert encode(photo(65, 10)).mode == IMAGE_JPEG


def test_quality_reaches_the_encoder() -> None:
    sizes = [
        len(encode(photo(), EncodeOptions(max_side=None, quality=q, encoding="auto")).payload)
        for q in (30, 95)
    ]
    assert sizes[0] < sizes[1]


WHOLE = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)), "JPEG")


def test_damage_is_named() -> None:
    png = save(Image.fromarray(photo()), "PNG")
    assert refuse(b"") == "is empty"
    assert refuse(b"GET / HTTP/1.1").startswith("is not an image")
    assert "Premature end" in refuse(WHOLE[:2000]) or "truncated" in refuse(WHOLE[:2000])
    assert refuse(png[:200]).startswith("cannot be decoded")
    assert refuse(save(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")).endswith(
        "convert it to 8 or 16 bits"
    )


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in refuse(tmp_path / "pipe.jpg")


@pytest.mark.skipif(jpeg.decoder_name() != "turbojpeg", reason="libturbojpeg is not installed")
def test_damaged_bytes_within_a_jpeg_are_found() -> None:
    """Pillow decodes this stream without a word; FFCV's decoder returns an error for it."""
    damaged = bytearray(WHOLE)
    damaged[3000:3040] = bytes(40)
    Image.open(io.BytesIO(damaged)).load()
    assert refuse(bytes(damaged)).startswith("is a damaged JPEG: Corrupt JPEG data")


def test_without_libturbojpeg_pillow_finds_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert jpeg.decoder_name() == "pillow"
    assert encode(WHOLE).payload == WHOLE
    assert "truncated" in refuse(WHOLE[:2000])


# What a JPEG may look like


def stray(where: str, bytes_between: bytes) -> bytes:
    """A smooth photograph whose JPEG stream has bytes between two segments of its header."""
    data = save(Image.fromarray(photo()), "JPEG", quality=95)
    place = {
        "after the start": 2,
        "before the tables": data.index(b"\xff\xdb"),
        "before the scan": data.index(b"\xff\xda"),
    }
    return data[: place[where]] + bytes_between + data[place[where] :]


@pytest.mark.parametrize("where", ["after the start", "before the tables", "before the scan"])
@pytest.mark.parametrize("between", [b"\0" * 6, b"junk", b"\xff\0\xff\0x"])
def test_stray_bytes_before_a_marker_are_stepped_over(where: str, between: bytes) -> None:
    encoded = encode(stray(where, between))
    assert encoded.repaired and not encoded.copied and encoded.mode == IMAGE_JPEG
    assert mean_difference(encoded, photo()) < 3
    assert jpeg.check_jpeg(encoded.payload, jpeg.read_frame(encoded.payload)) == ("", "")  # type: ignore[arg-type]


def test_fill_bytes_are_no_stray_bytes() -> None:
    data = stray("before the scan", b"\xff\xff")
    assert encode(data) == Encoded(IMAGE_JPEG, 96, 80, data, True)


turbojpeg = pytest.mark.skipif(jpeg.decoder_name() != "turbojpeg", reason="libturbojpeg is not installed")


@turbojpeg
def test_a_missing_end_marker_is_added() -> None:
    data = save(Image.fromarray(photo()), "JPEG", quality=95)
    encoded = encode(data[:-2])
    assert encoded.repaired and not encoded.copied
    assert mean_difference(encoded, photo()) < 3
    assert encode(data).copied


@turbojpeg
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_stream_that_ends_anywhere_before_its_end_is_damaged(options: dict[str, object]) -> None:
    """Only what has all of its bits is ended: a stream of several scans would not tell that the last are missing."""
    data = save(Image.fromarray(photo(40, 24)), "JPEG", **options)
    wrong = []
    for length in range(200, len(data) - 3):
        result = encode_sample(Sample("it", 0, data[:length]), RAW)
        if (
            isinstance(result, Encoded)
            and mean_difference(result, np.asarray(Image.open(io.BytesIO(data)))) > 0
        ):
            wrong.append(length)
    assert not wrong


def test_without_libturbojpeg_no_end_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would decode what is missing as grey, without a word."""
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert "truncated" in refuse(WHOLE[:-300])


def test_repaired_jpegs_are_counted_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(stray("before the scan", b"junk"))
    (tmp_path / "in" / "a" / "1.jpg").write_bytes(WHOLE)
    convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1, progress=False)
    assert check_opening(tmp_path / "x.beton").storage == {"copied": 1, "jpeg": 1, "raw": 0, "repaired": 1}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_converted() -> None:
    encoded = encode(save(Image.fromarray(photo()), "AVIF", quality=95))
    assert encoded.mode == IMAGE_JPEG and mean_difference(encoded, photo()) < 4


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x1cftypheic", "HEIF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"PAR1", "it is parquet"),
    ],
)
def test_formats_that_are_not_supported_are_named(start: bytes, name: str) -> None:
    assert name in refuse(start + bytes(100))


def test_avif_that_pillow_does_not_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encode_module, image_file):
        monkeypatch.setattr(module, "FORMATS", ("JPEG", "PNG"))
    assert "it seems to be AVIF, not supported here; supported are JPEG, PNG" in refuse(
        b"\0\0\0\x1cftypavif" + bytes(100)
    )


# Large images


def large(kind: str, width: int = 700, height: int = 200, **options: object) -> bytes:
    return save(Image.fromarray(photo(width, height)), kind, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_more_pixels_than_the_limit_are_refused_and_an_option_allows_them(kind: str) -> None:
    options = EncodeOptions(max_side=None, quality=90, encoding="auto", max_pixels=700 * 200 - 1)
    result = encode_sample(Sample("it", 0, large(kind)), options)
    assert isinstance(result, BadImage) and result.reason.endswith("pixels: set --max-pixels to allow it")
    assert encode(large(kind), replace(options, max_pixels=700 * 200)).width == 700


def test_the_limit_does_not_stop_max_side_for_a_jpeg() -> None:
    """The JPEG is decoded at a fraction of its sides, which must not change what is seen."""
    options = EncodeOptions(max_side=100, quality=95, encoding="auto", max_pixels=20_000)
    encoded = encode(large("JPEG", quality=95), options)
    assert (encoded.width, encoded.height) == (100, 29) and not encoded.copied
    assert mean_difference(encoded, np.asarray(Image.fromarray(photo(700, 200)).resize((100, 29)))) < 4
    progressive = encode_sample(Sample("it", 0, large("JPEG", progressive=True)), options)
    assert isinstance(progressive, BadImage)


def test_pillow_s_own_limit_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("JPEG", "PNG"):
        assert encode(large(kind)).width == 700
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert AUTO.pixel_limit == 178_956_970
    assert EncodeOptions(max_side=512, quality=90, encoding="auto").pixel_limit == 4 * 178_956_970


def test_what_was_allowed_is_verified_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.jpg").write_bytes(large("JPEG"))
    convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1, progress=False, max_pixels=700 * 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert verify(tmp_path / "x.beton", num_threads=1).num_samples == 1
    assert open_beton(tmp_path / "x.beton").image(0).size == (700, 200)


def test_a_side_that_libjpeg_cannot_decode_is_refused() -> None:
    assert "over 65500 pixels a side" in refuse(large("PNG", 65_501, 1))
    assert encode(large("PNG", 65_500, 1)).width == 65_500
    header = bytearray(WHOLE)
    place = header.index(b"\xff\xc0")
    header[place + 5 : place + 9] = (1).to_bytes(2, "big") + (65_501).to_bytes(2, "big")
    assert "libjpeg decodes no side over 65,500" in refuse(bytes(header))


# Warnings of libraries


def damaged_exif(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a description that is long enough to stand outside of its entry"
    data = bytearray(save(Image.fromarray(photo()), kind, exif=exif))
    place = data.index(b"a description") - 20
    data[place : place + 20] = b"\xff" * 20
    return bytes(data)


def tiff_with_wrong_tags() -> bytes:
    """A TIFF of which libtiff itself would write to stderr: the end of its list of tags is overwritten."""
    data = bytearray(save(Image.fromarray(GREY > 99), "TIFF", compression="group4"))
    data[-20:-10] = b"\xff" * 10
    return bytes(data)


def tiff_of_many_samples() -> bytes:
    """A TIFF of which Pillow logs an error: tag 277, samples a pixel, is 255."""
    data = save(Image.fromarray(photo()), "TIFF")
    entry = b"\x15\x01\x03\x00\x01\x00\x00\x00"
    assert entry in data
    return data.replace(entry + b"\3", entry + b"\xff")


NOISY = {
    "exif in a JPEG": damaged_exif("JPEG"),
    "exif in a WebP": damaged_exif("WEBP"),
    "no exif at all": save(Image.fromarray(photo()), "JPEG", exif=b"Exif\0\0no TIFF header"),
    "TIFF of many samples": tiff_of_many_samples(),
    "TIFF with wrong tags": tiff_with_wrong_tags(),
    "transparent palette": save(Image.fromarray(photo()).quantize(16), "PNG", transparency=bytes(range(16))),
}


@pytest.mark.parametrize("kind", NOISY)
def test_libraries_warn_of_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # of which Pillow would warn, too
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_sample(Sample("it", 0, NOISY[kind]), AUTO)
    assert not caught


def test_damaged_exif_data_is_no_reason_to_lose_an_image() -> None:
    assert encode(NOISY["no exif at all"]).copied


@pytest.mark.parametrize("workers", [1, 2])
def test_a_conversion_prints_no_warning(tmp_path: Path, workers: int) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number, data in enumerate(NOISY.values()):
        (tmp_path / "in" / "a" / str(number)).write_bytes(data)
    body = (
        "import sys\nfrom pathlib import Path\nfrom loaders.convert import convert\n"
        "convert(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False, on_error='skip')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", body, tmp_path / "in", tmp_path / "x.beton", str(workers)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "png"}, "--encoding png: not one of auto, jpeg, raw"),
        ({"quality": 0}, "--quality 0"),
        ({"quality": 101}, "--quality 101"),
        ({"max_side": 0}, "--max-side 0"),
        ({"max_side": 65_501}, "--max-side 65501: give a length from 1 to 65500"),
        ({"max_pixels": 0}, "--max-pixels 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"max_side": None, "quality": 90, "encoding": "auto"}
    with pytest.raises(DataError, match=message):
        EncodeOptions(**(values | options))  # type: ignore[arg-type]
