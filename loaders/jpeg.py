"""What a JPEG stream is and whether it is whole, by libjpeg-turbo's own judgement where it is installed."""

from __future__ import annotations

import ctypes
import io
import threading
from dataclasses import dataclass
from functools import cache
from typing import Final

from PIL import Image

LIBRARY: Final = "libturbojpeg.so.0"
"""TurboJPEG 2.x or 3.x under its Linux name; FFCV links it, so it is here wherever FFCV runs."""

# turbojpeg.h: TJPF_RGB, TJPF_CMYK, TJFLAG_ACCURATEDCT (as the loader decodes).
_RGB: Final = (0, 3)
_CMYK: Final = (11, 4)
_ACCURATE_DCT: Final = 4096
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


def read_frame(data: bytes) -> JPEGFrame | None:
    """The frame header of the JPEG stream `data`, or None if it has none."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return JPEGFrame(
                process=marker - 0xC0,
                bits=data[position + 4],
                height=int.from_bytes(data[position + 5 : position + 7], "big"),
                width=int.from_bytes(data[position + 7 : position + 9], "big"),
                num_components=data[position + 9],
            )
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def decoder_name() -> str:
    """Which decoder `check_jpeg` asks: "turbojpeg" or "pillow"."""
    return "pillow" if _library() is None else "turbojpeg"


def check_jpeg(data: bytes, frame: JPEGFrame) -> tuple[str, str]:
    """Decode a JPEG stream fully and say what is wrong with it: (damage, remark), each "" if there is none.

    Damage means that pixels are lost. A remark is a warning that leaves the pixels whole, yet gives the same
    failing return code, so that FFCV cannot tell it from damage: such a stream must be encoded again.
    Without the library Pillow decodes, which finds a stream that ends too early and does not report damaged bytes
    within; the manifest says which of the two it was.
    """
    library = _library()
    if library is None:
        try:
            Image.open(io.BytesIO(data), formats=["JPEG"]).load()
        except (OSError, SyntaxError, ValueError) as error:
            return str(error), ""
        return "", ""
    if not hasattr(_thread, "handle"):
        _thread.handle = library.tjInitDecompress()
    pixel_format, num_channels = _CMYK if frame.num_components == 4 else _RGB
    pixels = ctypes.create_string_buffer(frame.width * frame.height * num_channels)
    status = library.tjDecompress2(
        _thread.handle, data, len(data), pixels, frame.width, 0, frame.height, pixel_format, _ACCURATE_DCT
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
