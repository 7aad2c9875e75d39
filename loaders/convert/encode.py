"""One image of a source → what the .beton file stores of it.

- A JPEG that is baseline (or extended sequential) with 8 bits and three components, upright, and within
  `max_side` is stored byte for byte. It is decoded once, to know that it is whole. A progressive JPEG is
  encoded again, for it takes about twice as long to decode (1.6 to 2.3 times on ImageNet photographs).
- So is one with stray bytes before a marker of its header, or without its end marker: libjpeg and Pillow read it,
  other decoders may not. The manifest counts them as `repaired`.
- Anything else is brought to upright 8-bit RGB (`loaders.image_file`).
- An image of more than `max_pixels` is refused. With `max_side`, a JPEG may have up to 64 times as many: it is decoded
  at a half, a quarter or an eighth of its sides, whatever suffices.
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
from PIL import Image, UnidentifiedImageError

from loaders.beton import IMAGE_JPEG, IMAGE_RAW, MAX_PAGE_BYTES
from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.image_file import (
    FORMATS,
    MAX_PIXELS,
    is_upright,
    quiet_pillow,
    read_image_file,
    upright_rgb,
    what_it_is,
)
from loaders.image_folder import unreadable
from loaders.jpeg import (
    JPEGFrame,
    check_jpeg,
    decoder_name,
    is_jpeg,
    read_frame,
    with_end_marker,
    without_stray_bytes,
)

Encoding = Literal["auto", "jpeg", "raw"]
ENCODINGS: Final[tuple[str, ...]] = get_args(Encoding)
RAW_SIDE: Final = 64
MAX_SIDE: Final = 65_500  # libjpeg's; the tables keep 16 bits
_ALLOW: Final = "set --max-pixels to allow it"


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How images are stored."""

    max_side: int | None
    quality: int
    encoding: Encoding
    max_pixels: int | None = None
    """The largest image that is decoded; None: `MAX_PIXELS`, or four times that where `max_side` makes it smaller."""

    @property
    def pixel_limit(self) -> int:
        return self.max_pixels or MAX_PIXELS * (1 if self.max_side is None else 4)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise DataError(f"--encoding {self.encoding}: not one of {', '.join(ENCODINGS)}")
        if not 1 <= self.quality <= 100:
            raise DataError(f"--quality {self.quality}: give a JPEG quality from 1 to 100")
        if self.max_side is not None and not 1 <= self.max_side <= MAX_SIDE:
            raise DataError(f"--max-side {self.max_side}: give a length from 1 to {MAX_SIDE} pixels")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise DataError(f"--max-pixels {self.max_pixels}: give a number of pixels, 1 or more")


class Encoded(NamedTuple):
    """What the file stores of one image."""

    mode: int
    width: int
    height: int
    payload: bytes
    copied: bool
    """Stored byte for byte."""
    repaired: bool = False
    """A JPEG that had stray bytes or no end marker."""


class BadImage(NamedTuple):
    """Why an image cannot be stored."""

    reason: str


def encode_sample(sample: Sample, options: EncodeOptions) -> Encoded | BadImage:
    """Read, check and encode one image; what is wrong with the image is returned.

    Errors: DataError if its file cannot be read, which says nothing of the image.
    """
    try:
        if isinstance(sample.image, np.ndarray):
            result = _store(Image.fromarray(sample.image), options)
        else:
            data = _read(sample.image) if isinstance(sample.image, Path) else sample.image
            result = _encode_bytes(data, options)
    except (MemoryError, DataError):
        raise
    except Image.DecompressionBombError:
        return BadImage(f"has over {options.pixel_limit:,} pixels: {_ALLOW}")
    except UnidentifiedImageError:  # its message holds an address in memory
        return BadImage("is no image that Pillow reads")
    except Exception as error:  # Pillow's plug-ins raise anything at all on damaged files
        return BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}")
    if isinstance(result, Encoded) and len(result.payload) > MAX_PAGE_BYTES:
        return BadImage(
            f"takes {len(result.payload)} bytes, over the largest page of {MAX_PAGE_BYTES}: set --max-side"
        )
    return result


def _read(path: Path) -> bytes:
    try:
        return read_image_file(path)
    except OSError as error:
        raise unreadable(error, path) from error


def _encode_bytes(data: bytes, options: EncodeOptions) -> Encoded | BadImage:
    if not data:
        return BadImage("is empty")
    if is_jpeg(data):
        with quiet_pillow(None):
            return _encode_jpeg(data, options)
    with quiet_pillow(options.pixel_limit):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            return BadImage(f"is not an image ({what_it_is(data)})")
        if image.width * image.height > options.pixel_limit:
            return BadImage(f"is {image.width}x{image.height}, over {options.pixel_limit:,} pixels: {_ALLOW}")
        return _store(upright_rgb(image), options)


def _encode_jpeg(data: bytes, options: EncodeOptions) -> Encoded | BadImage:
    stream = without_stray_bytes(data)
    frame = read_frame(stream)
    if frame is None:
        return BadImage("is a JPEG without a frame header")
    if max(frame.width, frame.height) > MAX_SIDE:
        return BadImage(f"is {frame.width}x{frame.height}, and libjpeg decodes no side over {MAX_SIDE:,}")
    scale = _scale(frame, options)
    if scale is None:
        return BadImage(f"is {frame.width}x{frame.height}, over {options.pixel_limit:,} pixels: {_ALLOW}")
    if decoder_name() == "turbojpeg":  # Pillow would not tell that pixels are missing, too
        stream = with_end_marker(stream, frame)
    damage, remark = check_jpeg(stream, frame, scale)
    if damage:
        return BadImage(f"is a damaged JPEG: {check_jpeg(data, frame, scale)[0] or damage}")
    image = Image.open(io.BytesIO(stream), formats=FORMATS)
    fits = max(frame.width, frame.height) <= (options.max_side or MAX_SIDE)
    repaired = stream is not data
    if (
        options.encoding != "raw"
        and fits
        and _is_plain(frame)
        and is_upright(image)
        and not (remark or repaired)
    ):
        return Encoded(IMAGE_JPEG, frame.width, frame.height, data, True)
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
    result = _store(upright_rgb(image), options)
    return result._replace(repaired=repaired) if isinstance(result, Encoded) else result


def _scale(frame: JPEGFrame, options: EncodeOptions) -> int | None:
    """By what the sides of a JPEG are divided as it is decoded, so that it is not too large; None if it stays so."""
    longer = max(frame.width, frame.height)
    # Of a progressive JPEG all coefficients are in memory, whatever the scale.
    scales = (1, 2, 4, 8) if options.max_side is not None and frame.process <= 1 else (1,)
    for limit in (options.max_pixels or MAX_PIXELS, options.pixel_limit):
        for scale in scales:
            large_enough = scale == 1 or longer // scale >= (options.max_side or 0)
            if large_enough and -(-frame.width // scale) * -(-frame.height // scale) <= limit:
                return scale
    return None


def _is_plain(frame: JPEGFrame) -> bool:
    return frame.process in (0, 1) and frame.bits == 8 and frame.num_components == 3


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
