"""What a JPEG stream is and whether it is whole, by libjpeg-turbo's own judgement where it is installed."""

from __future__ import annotations

import ctypes
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

from PIL import Image

LIBRARY: Final = "libturbojpeg.so.0"
"""TurboJPEG 2.x or 3.x under its Linux name; FFCV links it, so it is here wherever FFCV runs."""

# turbojpeg.h: TJPF_RGB, TJPF_CMYK, TJFLAG_ACCURATEDCT (as the loader decodes).
_RGB: Final = (0, 3)
_CMYK: Final = (11, 4)
_ACCURATE_DCT: Final = 4096
_SCAN: Final = 0xDA  # the marker SOS
# The warnings that mean lost pixels. Others (an unknown Adobe marker, a wrong header version) leave the
# pixels whole.
_DAMAGE: Final = ("Corrupt JPEG data", "Premature end of JPEG file")


@dataclass(frozen=True, kw_only=True)
class JPEGFrame:
    """The frame header (SOFn) of a JPEG stream; ITU T.81, B.2.2."""

    process: int
    """n of SOFn: 0 is baseline, 2 progressive."""
    bits: int
    width: int
    height: int
    num_components: int


class _Segment(NamedTuple):
    start: int
    """Its first byte of 255; where the one before ended if there is nothing between the two."""
    at: int
    """Its marker's second byte, behind which its length stands."""
    end: int


def is_jpeg(data: bytes) -> bool:
    """Whether it begins as a JPEG stream does."""
    return data.startswith(b"\xff\xd8")


def read_frame(data: bytes) -> JPEGFrame | None:
    """The frame header of the JPEG stream `data`, or None if it has none."""
    for _, at, end in _segments(data):
        if 0xC0 <= data[at] <= 0xCF and data[at] not in (0xC4, 0xC8, 0xCC) and end - at >= 9:
            return JPEGFrame(
                process=data[at] - 0xC0,
                bits=data[at + 3],
                height=int.from_bytes(data[at + 4 : at + 6], "big"),
                width=int.from_bytes(data[at + 6 : at + 8], "big"),
                num_components=data[at + 8],
            )
    return None


def without_stray_bytes(data: bytes) -> bytes:
    """The stream without what stands between the segments of its header: libjpeg and Pillow step over it.

    `data` itself if there is nothing.
    """
    segments = list(_segments(data))
    ends = [2, *(segment.end for segment in segments)]
    if not segments or all(segment.start == end for segment, end in zip(segments, ends, strict=False)):
        return data
    return b"".join([data[:2], *(data[start:end] for start, _, end in segments), data[ends[-1] :]])


def with_end_marker(data: bytes, frame: JPEGFrame) -> bytes:
    """The stream with an end marker, if only that is missing; `data` itself if it has one.

    That its pixels are whole has to be checked. Only a stream of one scan is ended: one of several would not tell
    that the last of them are missing.
    """
    *_, last = _segments(data)
    num_in_scan = data[last.at + 3] if last.end - last.at > 3 else 0
    if data[last.at] != _SCAN or num_in_scan != frame.num_components or frame.process > 1:
        return data
    return data if data.find(b"\xff\xd9", last.end) >= 0 else data + b"\xff\xd9"


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments of the header, the first scan's the last: ITU T.81, B.1.1. It ends where a stream is no JPEG."""
    position = 2
    while True:
        start = data.find(b"\xff", position)
        at = start + 1
        while 0 < at < len(data) and data[at] == 0xFF:  # fill bytes
            at += 1
        if start < 0 or at >= len(data) or data[at] == 0xD9:
            return
        if data[at] == 0:  # no marker, but a stray 255
            position = at + 1
            continue
        alone = data[at] == 0x01 or 0xD0 <= data[at] <= 0xD7
        end = at + 1 + (0 if alone else int.from_bytes(data[at + 1 : at + 3], "big"))
        if end > len(data) or (not alone and end < at + 3):
            return
        yield _Segment(start, at, end)
        if data[at] == _SCAN:
            return
        position = end


def decoder_name() -> str:
    """Which decoder `check_jpeg` asks: "turbojpeg" or "pillow"."""
    return "pillow" if _library() is None else "turbojpeg"


def check_jpeg(data: bytes, frame: JPEGFrame, scale: int = 1) -> tuple[str, str]:
    """Decode a JPEG stream fully and say what is wrong with it: (damage, remark), each "" if there is none.

    A `scale` of 2, 4 or 8 divides the sides of what is decoded, and so the memory; every bit is read all the same.

    Damage means that pixels are lost. A remark is a warning that leaves the pixels whole, yet gives the same
    failing return code, so that FFCV cannot tell it from damage: such a stream must be encoded again.
    Without the library Pillow decodes, which finds a stream that ends too early and does not report damaged bytes
    within; the manifest says which of the two it was.
    """
    library = _library()
    if library is None:
        try:
            image = Image.open(io.BytesIO(data), formats=["JPEG"])
            image.draft(None, (max(1, frame.width // scale), max(1, frame.height // scale)))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            return str(error), ""
        return "", ""
    if not hasattr(_thread, "handle"):
        _thread.handle = library.tjInitDecompress()
    pixel_format, num_channels = _CMYK if frame.num_components == 4 else _RGB
    width, height = -(-frame.width // scale), -(-frame.height // scale)
    pixels = ctypes.create_string_buffer(width * height * num_channels)
    status = library.tjDecompress2(
        _thread.handle, data, len(data), pixels, width, 0, height, pixel_format, _ACCURATE_DCT
    )
    if status == 0:
        return "", ""
    message = library.tjGetErrorStr2(_thread.handle).decode(errors="replace")
    is_warning = library.tjGetErrorCode(_thread.handle) == 0
    return ("", message) if is_warning and not message.startswith(_DAMAGE) else (message, "")


_thread = threading.local()  # a decompressor serves one thread


@cache
def _library() -> ctypes.CDLL | None:
    """libturbojpeg with the signatures of the functions used here, or None where it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, number = ctypes.c_void_p, ctypes.c_int
    library.tjInitDecompress.restype = handle
    library.tjGetErrorCode.argtypes = [handle]
    library.tjGetErrorStr2.argtypes = [handle]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    library.tjDecompress2.argtypes = [
        handle, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, number, number, number, number, number
    ]  # fmt: skip
    return library
