"""What is stored of one image: JPEG streams that fit byte for byte, everything else as 8-bit RGB."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from loaders import jpeg
from loaders.beton import IMAGE_JPEG, IMAGE_RAW
from loaders.convert.encode import BadImage, Encoded, EncodeOptions, encode_sample
from loaders.convert.source import Sample
from loaders.errors import DataError

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
    assert refuse(Path("/nowhere/at/all.jpg")).startswith("cannot be decoded")
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "png"}, "--encoding png: not one of auto, jpeg, raw"),
        ({"quality": 0}, "--quality 0"),
        ({"quality": 101}, "--quality 101"),
        ({"max_side": 0}, "--max-side 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"max_side": None, "quality": 90, "encoding": "auto"}
    with pytest.raises(DataError, match=message):
        EncodeOptions(**(values | options))  # type: ignore[arg-type]
