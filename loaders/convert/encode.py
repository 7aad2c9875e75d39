"""One image of a source → what the .beton file stores of it.

- A JPEG that is baseline (or extended sequential) with 8 bits and three components, upright, and within
  `max_side` is stored byte for byte. It is decoded once, to know that it is whole. A progressive JPEG is
  encoded again, for it takes about twice as long to decode (1.6 to 2.3 times on ImageNet photographs).
- Anything else is brought to 8-bit RGB. Transparency is dropped as torchvision's `ImageFolder` does
  (`convert("RGB")`), 16-bit grey keeps its high byte, the EXIF orientation is applied, and of several frames
  the first is taken. Colour profiles are ignored, as every common training pipeline does.
- An image whose longer side exceeds `max_side` is brought down to it with Pillow's antialiased Lanczos
  filter.
- `auto` then stores an image of at most 64 pixels a side raw, so that nothing is lost, and a larger one as
  JPEG, with the colour at half resolution (4:2:0) as most photographs on the web are: the fastest to decode.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from loaders.beton import IMAGE_JPEG, IMAGE_RAW, MAX_PAGE_BYTES
from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.jpeg import JPEGFrame, check_jpeg, read_frame

Encoding = Literal["auto", "jpeg", "raw"]
ENCODINGS: Final[tuple[str, ...]] = get_args(Encoding)
RAW_SIDE: Final = 64
MAX_SIDE: Final = 65535  # the tables keep 16 bits
# Only formats that Pillow decodes by itself: its EPS plug-in, for one, would run Ghostscript on what it is
# given.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = (None, 0, 1)  # 0 is not in the EXIF standard; cameras write it for "unknown"
_JPEG_FORMATS: Final = ("JPEG", "MPO")  # MPO: several JPEG streams in one file, of which the first counts


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How images are stored."""

    max_side: int | None
    quality: int
    encoding: Encoding

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise DataError(f"--encoding {self.encoding}: not one of {', '.join(ENCODINGS)}")
        if not 1 <= self.quality <= 100:
            raise DataError(f"--quality {self.quality}: give a JPEG quality from 1 to 100")
        if self.max_side is not None and not 1 <= self.max_side <= MAX_SIDE:
            raise DataError(f"--max-side {self.max_side}: give a length from 1 to {MAX_SIDE} pixels")


class Encoded(NamedTuple):
    """What the file stores of one image."""

    mode: int
    width: int
    height: int
    payload: bytes
    copied: bool
    """Stored byte for byte."""


class BadImage(NamedTuple):
    """Why an image cannot be stored."""

    reason: str


def encode_sample(sample: Sample, options: EncodeOptions) -> Encoded | BadImage:
    """Read, check and encode one image; what is wrong with the image is returned, never raised."""
    try:
        if isinstance(sample.image, np.ndarray):
            result = _store(Image.fromarray(sample.image), options)
        else:
            result = _encode_bytes(
                _read(sample.image) if isinstance(sample.image, Path) else sample.image, options
            )
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything at all on damaged files
        return BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}")
    if isinstance(result, Encoded) and len(result.payload) > MAX_PAGE_BYTES:
        return BadImage(
            f"takes {len(result.payload)} bytes, over the largest page of {MAX_PAGE_BYTES}: set --max-side"
        )
    return result


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise OSError("not a regular file")  # opening a pipe would wait for ever
    return path.read_bytes()


def _encode_bytes(data: bytes, options: EncodeOptions) -> Encoded | BadImage:
    if not data:
        return BadImage("is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        return BadImage(f"is not an image (none of {', '.join(FORMATS)})")
    orientation = image.getexif().get(_ORIENTATION)
    if image.format in _JPEG_FORMATS:
        frame = read_frame(data)
        if frame is None:
            return BadImage("is a JPEG without a frame header")
        damage, remark = check_jpeg(data, frame)
        if damage:
            return BadImage(f"is a damaged JPEG: {damage}")
        fits = max(frame.width, frame.height) <= (options.max_side or MAX_SIDE)
        if options.encoding != "raw" and fits and not remark and orientation in _UPRIGHT and _is_plain(frame):
            return Encoded(IMAGE_JPEG, frame.width, frame.height, data, True)
    image.load()
    source_format = image.format
    if orientation not in _UPRIGHT:
        image = ImageOps.exif_transpose(image)
    return _store(_to_rgb(image, source_format), options)


def _is_plain(frame: JPEGFrame) -> bool:
    return frame.process in (0, 1) and frame.bits == 8 and frame.num_components == 3


def _to_rgb(image: Image.Image, source_format: str | None) -> Image.Image:
    """Any image as 8-bit RGB. Errors: ValueError for pixels whose range is not known."""
    if image.mode == "F" or (
        image.mode == "I" and source_format != "PPM"
    ):  # Pillow reads 16-bit PGM as mode I
        raise ValueError("pixels of 32 bits have no known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips everything over 255 to white
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _store(image: Image.Image, options: EncodeOptions) -> Encoded | BadImage:
    """Encode an RGB image after bringing it down to `max_side`."""
    longer = max(image.size)
    if options.max_side is not None and longer > options.max_side:
        width, height = (max(1, round(side * options.max_side / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if max(image.size) > MAX_SIDE:
        return BadImage(f"is {image.width}x{image.height}, over {MAX_SIDE} pixels a side: set --max-side")
    if options.encoding == "raw" or (options.encoding == "auto" and max(image.size) <= RAW_SIDE):
        return Encoded(IMAGE_RAW, image.width, image.height, image.tobytes(), False)
    return Encoded(IMAGE_JPEG, image.width, image.height, to_jpeg(image, options.quality), False)


def to_jpeg(image: Image.Image | npt.NDArray[np.uint8], quality: int) -> bytes:
    """A baseline 4:2:0 JPEG stream of an RGB image (Pillow's, or (H, W, 3) uint8)."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
