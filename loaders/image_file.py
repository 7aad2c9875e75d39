"""An encoded image of any format → upright 8-bit RGB: what conversion stores and what the folder loaders show.

Transparency is dropped as torchvision's `ImageFolder` does (`convert("RGB")`), 16-bit grey keeps its high byte, the
EXIF orientation is applied, and of several frames the first is taken. Colour profiles are ignored, as every common
training pipeline does.
"""

from __future__ import annotations

import ctypes
import io
import logging
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError, _imaging, features

from loaders.jpeg import is_jpeg, without_stray_bytes
from loaders.names import printable

MAX_PIXELS: Final = 178_956_970
"""The largest image that is decoded unless asked otherwise; 512 MiB of RGB. Pillow's own limit, a quarter of 2 GiB."""
MAX_FILE_BYTES: Final = 1 << 31
# Only formats that Pillow decodes by itself: its EPS plug-in, for one, would run Ghostscript on what it is
# given.
FORMATS: Final = (
    "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", *(["AVIF"] if features.check("avif") else []),
)  # fmt: skip
JPEG_FORMATS: Final = ("JPEG", "MPO")
"""Pillow's names of JPEG. MPO is several JPEG streams in one file, of which the first counts."""
_ORIENTATION: Final = 0x0112
# EXIF 2.32, 4.6.4.A: what turns an image of each orientation upright. Cameras write 0, too, for "unknown".
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES: Final = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))
# What files that are none of FORMATS begin with, and what they are: (offset, bytes, name).
_OTHERS: Final = (
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
)


# With no handler at all, Python would print what Pillow logs as an error; it raises one, too.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextmanager
def quiet_pillow(max_pixels: int | None) -> Iterator[None]:
    """Leave away warnings, which name no file, and take `max_pixels` for Pillow's limit; None for no limit.

    For one thread of a process at a time: both are the whole process's.

    Errors: Pillow's DecompressionBombError for a larger image.
    """
    _quiet_libtiff()
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns at its limit and refuses at twice that.
        Image.MAX_IMAGE_PIXELS = None if max_pixels is None else -(-max_pixels // 2)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes) -> Image.Image:
    """The image in `data`, its header read and no pixel yet.

    Errors: ValueError, if it is none of FORMATS, that says what it is; and what Pillow raises for a bad header.
    """
    try:
        return Image.open(io.BytesIO(without_stray_bytes(data) if is_jpeg(data) else data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(what_it_is(data)) from None


def open_image_file(path: Path) -> Image.Image:
    """The image in a file, its header read and not much more.

    Errors: as `open_image` and `check_image_file`.
    """
    check_image_file(path)
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        return open_image(path.read_bytes())


@cache
def _quiet_libtiff() -> None:
    """Keep libtiff, as Pillow brings it, from writing to stderr; Pillow raises for what matters."""
    with suppress(OSError, AttributeError):  # a Pillow without libtiff, or one that was linked with it
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetWarningHandler(None)
        library.TIFFSetErrorHandler(None)


def what_it_is(data: bytes) -> str:
    """What a file that is none of FORMATS seems to be, for a message."""
    if data.startswith(b"PAR1"):
        return "it is parquet; give its folder as the source"
    for offset, start, name in _OTHERS:
        if data.startswith(start, offset):
            how = "damaged" if name in FORMATS else f"not supported here; supported are {', '.join(FORMATS)}"
            return f"it seems to be {name}, {how}"
    return f"none of {', '.join(FORMATS)}"


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that was opened and not decoded, turned upright."""
    # Pillow turns a TIFF by itself and has swapped its sides already.
    swaps = image.format != "TIFF" and _turn(image) in _SWAPS_SIDES
    return (image.height, image.width) if swaps else (image.width, image.height)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image, as upright 8-bit RGB.

    Errors: ValueError for pixels whose range is not known; what Pillow raises for damaged ones.
    """
    source_format = image.format
    # Before the turn, since the EXIF data of a PNG may stand behind its pixels.
    image.load()
    turned = _turn(image)
    if turned is not None:
        image = image.transpose(turned)
    # Pillow reads 16-bit PGM as mode I.
    if image.mode == "F" or (image.mode == "I" and source_format != "PPM"):
        raise ValueError("pixels of 32 bits have no known range; convert it to 8 or 16 bits")
    # 16-bit grey; Pillow's own conversion clips everything over 255 to white.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def is_upright(image: Image.Image) -> bool:
    """Whether the pixels of an opened image stand as it is shown."""
    return _turn(image) is None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright, by its EXIF data; None if nothing does, or if that data is damaged."""
    try:
        # Not the method of PNG images, which decodes them to find what may stand behind the pixels.
        found = Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # damaged EXIF data makes it raise anything at all, and is no reason to lose the pixels
        return None
    return _TURNS.get(found) if isinstance(found, int) else None


def read_image_file(path: Path) -> bytes:
    """The bytes of a file. Errors: as `check_image_file`."""
    check_image_file(path)
    return path.read_bytes()


def check_image_file(path: Path) -> None:
    """Refuse what is not to be read as an image.

    Errors: ValueError if it is no regular file, a link that leads nowhere, or over 2 GiB; OSError if the system
    refuses.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"is a link to {printable(path.readlink())}, which is not there")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")  # opening a pipe would wait for ever
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"has {status.st_size:,} bytes, over {MAX_FILE_BYTES:,}")
