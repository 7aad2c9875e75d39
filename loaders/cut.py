"""Read a sample, check it, decode it and cut crops from it, compiled and GIL-free.

A sample is read with `pread` into memory of the thread's own: from a memory map, a file that is cut short meanwhile
would kill the process.

The decoder is libjpeg-turbo with the accurate DCT, which gives Pillow's pixels bit for bit. (FFCV's own `imdecode`
asks for the fast one: a mean error of 1.2 levels a pixel on photographs to save 3% of the time.)

Crop and resize are one step, antialiased as Pillow's `image.crop(box).resize(size, filter)`. Sixteen output rows at a
time: a vertical pass straight from the uint8 rows into `rows`, a transposition into `tile` so that the sixteen rows
lie side by side, a horizontal pass on whole vectors (rows × channels) instead of on interleaved pixels, and the way
back. Each pass adds four taps a sweep. Sums are float32 and rounded once; Pillow rounds between its passes too, hence
differences of a level, bilinear, and of about a level on photographs, bicubic. On hard edges bicubic overshoots, and
Pillow also clamps to 0-255 between its passes: where black stands beside white, crops differ by up to 29 levels (a mean
of 2.8 over pixels that are black or white at random, the worst of what was tried).

What made it fast (AMD Zen 4, 500×375 to 224², bicubic: 0.78 ms → 0.29 ms): four taps a sweep, loops of 48 = 3 × 16
elements, no array slices in the inner loops (each costs two atomic reference counts), and transpositions by eights,
the largest interleaving that LLVM vectorises.

All of this stands in one file because numba's cache on disk looks only at the file of the function itself. What is
called by its symbol (libc, libturbojpeg, `loaders.checksum`) is not part of it.
"""

from __future__ import annotations

import math

import llvmlite.binding
import numba
import numpy as np
from numba import types

from loaders import checksum
from loaders.beton import IMAGE_JPEG
from loaders.errors import DataError
from loaders.jpeg import LIBRARY

# turbojpeg.h: TJPF_RGB and TJFLAG_ACCURATEDCT.
_PIXEL_FORMAT_RGB = 0
_ACCURATE_DCT = 4096

# Of `cut_batch`; any other status that is not 0 is the decoder's.
NOT_READ = -1001
DAMAGED = -1002

TILE_ROWS = 16
TILE_WIDTH = 3 * TILE_ROWS
NUM_TAPS_A_SWEEP = 4

# Sums may be reordered and fused; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "arcp", "nsz"}

try:
    llvmlite.binding.load_library_permanently(LIBRARY)
except RuntimeError as error:
    raise DataError(f"libturbojpeg is missing ({error}); on Debian: apt install libturbojpeg0") from error

# Symbols rather than ctypes objects, whose addresses would keep numba from caching what calls them.
_p, _i = types.uintp, types.int32
_init = types.ExternalFunction("tjInitDecompress", _p())
_destroy = types.ExternalFunction("tjDestroy", _i(_p))
_header = types.ExternalFunction("tjDecompressHeader3", _i(_p, _p, types.uint64, _p, _p, _p, _p))
_pread = types.ExternalFunction("pread", types.int64(_i, _p, types.uint64, types.int64))
_checksum = types.ExternalFunction(checksum.SYMBOL, types.uint64(_p, types.int64))
_decompress = types.ExternalFunction("tjDecompress2", _i(_p, _p, types.uint64, _p, _i, _i, _i, _i, _i))


@numba.njit(cache=True, nogil=True)
def decode_jpeg(data, out):  # type: ignore[no-untyped-def]
    """Decode a whole JPEG to RGB.

    Args: `data` (num_bytes,) uint8; `out` (H, W, 3) uint8, contiguous, of the image's size, written.
    Returns: 0, or another number when the data are damaged in any way (warnings count) or of another size; the
    pixels are then not to be used.
    """
    # A handle a call costs 0.3 µs and needs no thread-local state.
    handle = _init()
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    address = found.ctypes.data
    status = _header(handle, data.ctypes.data, data.size, address, address + 4, address + 8, address + 12)
    if status == 0 and (found[0] != out.shape[1] or found[1] != out.shape[0]):
        status = np.int32(-2)
    if status == 0:
        pixels, width, height = out.ctypes.data, out.shape[1], out.shape[0]
        status = _decompress(
            handle, data.ctypes.data, data.size, pixels, width, 0, height, _PIXEL_FORMAT_RGB, _ACCURATE_DCT
        )
    _destroy(handle)
    return status


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _filter(x, cubic):  # type: ignore[no-untyped-def]
    x = abs(x)
    if not cubic:
        return max(0.0, 1.0 - x)
    # Keys' cubic convolution with a = -0.5, as Pillow has it.
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weights(length, size, cubic):  # type: ignore[no-untyped-def]
    """Where each of `size` outputs reads in `length` inputs, with what weights; the filter widens with the scale.

    The number of taps is rounded up to whole sweeps, the added ones weighing 0.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    most = math.ceil(2 * support) + 1
    starts = np.empty(size, np.int64)
    counts = np.empty(size, np.int64)
    exact = np.empty(most)
    weights = np.zeros((size, -(-most // NUM_TAPS_A_SWEEP) * NUM_TAPS_A_SWEEP), np.float32)
    for out in range(size):
        center = (out + 0.5) * scale
        start = max(0, int(center - support + 0.5))
        stop = min(length, int(center + support + 0.5))
        total = 0.0
        for tap in range(stop - start):
            exact[tap] = _filter((start + tap - center + 0.5) / stretch, cubic)
            total += exact[tap]
        for tap in range(stop - start):
            weights[out, tap] = exact[tap] / total
        starts[out] = start
        counts[out] = -(-(stop - start) // NUM_TAPS_A_SWEEP) * NUM_TAPS_A_SWEEP
    return starts, counts, weights


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _filter_row(source, start, count, weights, y, rows, r):  # type: ignore[no-untyped-def]
    """rows[r] = weighted sum of the source rows from `start`; rows past the end have weight 0 and are not read."""
    last = source.shape[0] - 1
    length = source.shape[1]
    for tap in range(0, count, NUM_TAPS_A_SWEEP):
        a = start + tap
        b, c, d = min(a + 1, last), min(a + 2, last), min(a + 3, last)
        wa, wb, wc, wd = weights[y, tap], weights[y, tap + 1], weights[y, tap + 2], weights[y, tap + 3]
        if tap == 0:
            for j in range(length):
                rows[r, j] = (
                    wa * np.float32(source[a, j])
                    + wb * np.float32(source[b, j])
                    + wc * np.float32(source[c, j])
                    + wd * np.float32(source[d, j])
                )
        else:
            for j in range(length):
                rows[r, j] += (
                    wa * np.float32(source[a, j])
                    + wb * np.float32(source[b, j])
                    + wc * np.float32(source[c, j])
                    + wd * np.float32(source[d, j])
                )


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _filter_column(tile, start, count, weights, x, sums):  # type: ignore[no-untyped-def]
    """sums[x] = weighted sum of the tile's columns from `start`; the tile has a sweep of zero columns at its end."""
    for tap in range(0, count, NUM_TAPS_A_SWEEP):
        a = start + tap
        wa, wb, wc, wd = weights[x, tap], weights[x, tap + 1], weights[x, tap + 2], weights[x, tap + 3]
        if tap == 0:
            for i in range(TILE_WIDTH):
                sums[x, i] = wa * tile[a, i] + wb * tile[a + 1, i] + wc * tile[a + 2, i] + wd * tile[a + 3, i]
        else:
            for i in range(TILE_WIDTH):
                sums[x, i] += (
                    wa * tile[a, i] + wb * tile[a + 1, i] + wc * tile[a + 2, i] + wd * tile[a + 3, i]
                )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _interleave(rows, columns, length):  # type: ignore[no-untyped-def]
    """columns[j, r] = rows[r, j] for 16 rows, eight at a time."""
    for j in range(length):
        for r in range(8):
            columns[j, r] = rows[r, j]
    for j in range(length):
        for r in range(8):
            columns[j, r + 8] = rows[r + 8, j]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _deinterleave(columns, rows, length):  # type: ignore[no-untyped-def]
    """rows[r, j] = columns[j, r] for 16 rows, eight at a time."""
    for j in range(length):
        for r in range(8):
            rows[r, j] = columns[j, r]
    for j in range(length):
        for r in range(8):
            rows[r + 8, j] = columns[j, r + 8]


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def resize_crop(source, box, cubic, out):  # type: ignore[no-untyped-def]
    """Cut `box` out of an image and resize it.

    Args: `source` (H, W, 3) uint8, contiguous; `box` 4 integers (top, left, height, width) inside it; `cubic` chooses
    bicubic over bilinear; `out` (S, S, 3) uint8, contiguous, written.
    """
    top, left, height, width = box[0], box[1], box[2], box[3]
    size = out.shape[0]
    length = width * 3
    row_starts, row_counts, row_weights = _weights(height, size, cubic)
    col_starts, col_counts, col_weights = _weights(width, size, cubic)
    cropped = source.reshape(source.shape[0], source.shape[1] * 3)[
        top : top + height, left * 3 : left * 3 + length
    ]
    rows = np.zeros((TILE_ROWS, length), np.float32)
    tile = np.zeros((width + NUM_TAPS_A_SWEEP, TILE_WIDTH), np.float32)
    sums = np.empty((size, TILE_WIDTH), np.float32)
    levels = np.empty((size, TILE_WIDTH), np.uint8)
    level_rows = np.empty((TILE_ROWS, size * 3), np.uint8)
    tile_columns = tile.reshape((width + NUM_TAPS_A_SWEEP) * 3, TILE_ROWS)
    level_columns = levels.reshape(size * 3, TILE_ROWS)
    out_rows = out.reshape(size, size * 3)
    for first in range(0, size, TILE_ROWS):
        num_rows = min(TILE_ROWS, size - first)
        for r in range(num_rows):
            _filter_row(
                cropped, row_starts[first + r], row_counts[first + r], row_weights, first + r, rows, r
            )
        _interleave(rows, tile_columns, length)
        for x in range(size):
            _filter_column(tile, col_starts[x], col_counts[x], col_weights, x, sums)
        for x in range(size):
            for i in range(TILE_WIDTH):
                level = min(max(sums[x, i] + np.float32(0.5), np.float32(0)), np.float32(255))
                levels[x, i] = np.uint8(np.int32(level))
        _deinterleave(level_columns, level_rows, size * 3)
        for r in range(num_rows):
            for j in range(size * 3):
                out_rows[first + r, j] = level_rows[r, j]


@numba.njit(cache=True, nogil=True)
def _read(descriptor, start, data):  # type: ignore[no-untyped-def]
    """Fill `data` from byte `start` of a file; returns whether all of it was read."""
    done = 0
    failures = 0
    while done < data.size:
        count = _pread(descriptor, data.ctypes.data + done, data.size - done, start + done)
        if count == 0:
            return False
        if count < 0:
            # A signal may have interrupted a read over the network.
            failures += 1
            if failures == 3:
                return False
            continue
        done += count
    return True


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _cut_sample(descriptor, span, expected, is_jpeg, shape, boxes, sizes, cubic, out):  # type: ignore[no-untyped-def]
    """One sample of `cut_batch`, at `span` (start, bytes), with `expected` (whether to check, checksum); its status."""
    start, num_bytes = span
    is_checked, number = expected
    # Allocated here, scratch memory is one image a thread; as FFCV's own it would be the largest image of the
    # file for every sample of every batch in flight.
    stored = np.empty(num_bytes, np.uint8)
    if not _read(descriptor, start, stored):
        return np.int32(NOT_READ)
    if is_checked and _checksum(stored.ctypes.data, num_bytes) != number:
        return np.int32(DAMAGED)
    if is_jpeg:
        image = np.empty((shape[0], shape[1], 3), np.uint8)
        status = decode_jpeg(stored, image)
        if status != 0:
            return np.int32(status)
    else:
        image = stored.reshape((shape[0], shape[1], 3))
    begin = 0
    for crop in range(len(sizes)):
        size = sizes[crop]
        end = begin + 3 * size * size
        resize_crop(image, boxes[crop], cubic[crop], out[begin:end].reshape((size, size, 3)))
        begin = end
    return np.int32(0)


# Compiled when it is imported, for these types alone, so that no loader's thread compiles.
_TABLES = types.Tuple(
    [
        types.uint64[::1],
        types.uint64[::1],
        types.uint64[::1],
        types.uint8[::1],
        types.uint16[::1],
        types.uint16[::1],
    ]
)


@numba.njit(
    types.void(
        types.int64,
        types.int64[:, ::1],
        _TABLES,
        types.int64[::1],
        types.uint8[::1],
        types.uint8[:, ::1],
        types.int32[::1],
    ),
    cache=True,
    nogil=True,
    parallel=True,
)
def cut_batch(descriptor, rows, tables, sizes, cubic, crops, status):  # type: ignore[no-untyped-def]
    """Read, check and decode samples, and cut their crops, with all of numba's threads.

    Args: `descriptor` of the open file; `rows` (N, 1 + 4 · num_crops) int64: index of the sample, then (top, left,
    height, width) of each crop; `tables` of the file: starts and sizes (bytes), checksums (none: not checked) uint64,
    modes uint8, heights and widths uint16; `sizes` (num_crops,) int64; `cubic` (num_crops,) uint8; written: `crops` (N,
    sum of 3 · size²) uint8, one crop after the other, and `status` (N,) int32, 0 where all is well, else NOT_READ,
    DAMAGED or the decoder's, and the crops are not to be used.
    """
    starts, num_bytes, checksums, modes, heights, widths = tables
    is_checked = len(checksums) > 0
    num_crops = len(sizes)
    for n in numba.prange(len(rows)):
        index = rows[n, 0]
        status[n] = _cut_sample(
            descriptor,
            (np.int64(starts[index]), np.int64(num_bytes[index])),
            (is_checked, checksums[index] if is_checked else np.uint64(0)),
            modes[index] == IMAGE_JPEG,
            (np.int64(heights[index]), np.int64(widths[index])),
            rows[n, 1:].reshape((num_crops, 4)),
            sizes,
            cubic,
            crops[n],
        )
