"""The .beton file, version 2: one image and one label a sample, readable by stock FFCV 1.0.

    header, two field descriptors | metadata, 24 B a sample | checksums, 8 B a sample | slack | image bytes |
    allocations, 24 B a sample

The checksums (`loaders.checksum`, of the stored bytes of each sample) stand where FFCV reads nothing. Files of 0.1.0
have none; the manifest says which it is. The image bytes of a sample never straddle a page, because FFCV's process
cache reads whole pages and hands out slices of one. The allocation table stands last, since FFCV reads it to the end of
the file. Everything is little-endian. Layout facts: ffcv 1.0.2, `types.py`, `memory_allocator.py`, `reader.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from loaders.checksum import checksum
from loaders.errors import DataError
from loaders.held_file import HeldFile, cannot_write

IMAGE_JPEG: Final = 0
IMAGE_RAW: Final = 1
VERSION: Final = 2
MIN_PAGE_BYTES: Final = 1 << 21
DEFAULT_PAGE_BYTES: Final = 1 << 23
MAX_PAGE_BYTES: Final = (
    1 << 28
)  # FFCV holds several pages in memory; a larger one would be felt by every reader

HEADER: Final = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD: Final = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
# FFCV aligns the two fields as a C compiler would: 13 bytes of image, 3 of padding, the label.
METADATA: Final = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
CHECKSUM: Final = np.dtype("<u8")
ALLOCATION: Final = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FIELDS: Final = ((b"image", 2), (b"label", 1))  # name, FFCV's type id: RGBImageField, IntField
METADATA_START: Final = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True, kw_only=True)
class BetonTables:
    """What a .beton file says of its samples, one row a sample, N samples."""

    num_samples: int
    page_size: int
    """Bytes, a power of two."""
    modes: npt.NDArray[np.uint8]
    """(N,) uint8: IMAGE_JPEG or IMAGE_RAW."""
    widths: npt.NDArray[np.uint16]
    heights: npt.NDArray[np.uint16]
    labels: npt.NDArray[np.int64]
    data_ptrs: npt.NDArray[np.uint64]
    """(N,) uint64: offset of the image bytes from the start of the file."""
    data_sizes: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64] | None
    """(N,) uint64: XXH3 of the image bytes; None for a file of 0.1.0."""
    sha256: str
    """Of the bytes of all tables: header, field descriptors, metadata, checksums, allocations."""


class BetonWriter:
    """Writes a .beton file sample by sample, keeping in memory 40 bytes a sample and no pixels.

    The number of samples is known only at the end when some are skipped, so room for `max_samples` rows of
    metadata and checksums is reserved and what is not used stays as slack. A page too small for a sample is
    doubled until it fits: what was written before still straddles no page, for a large page is a union of
    small ones.

    Args:
        path: the file to write; replaced if it exists.
        max_samples: how many samples may come.
        page_bytes: the page to begin with, a power of two from 2 MiB to 256 MiB.

    Errors: DataError if the file cannot be written (no room, no permission).
    """

    def __init__(self, path: Path, *, max_samples: int, page_bytes: int = DEFAULT_PAGE_BYTES) -> None:
        if page_bytes & (page_bytes - 1) or not MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES:
            raise ValueError(
                f"page_bytes is {page_bytes}, not a power of two from {MIN_PAGE_BYTES} to {MAX_PAGE_BYTES}"
            )
        self.path = path
        self.num_samples = 0
        self.page_bytes = page_bytes
        self._metadata = np.zeros(max_samples, METADATA)
        self._checksums = np.zeros(max_samples, CHECKSUM)
        self._sizes = np.zeros(max_samples, "<u8")
        self._position = METADATA_START + self._metadata.nbytes + self._checksums.nbytes
        try:
            self._file = path.open("wb", buffering=1 << 20)
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error
        self._write(lambda: self._file.seek(self._position))

    def add(self, mode: int, width: int, height: int, label: int, payload: bytes) -> None:
        """Append one sample.

        Args:
            mode: IMAGE_JPEG or IMAGE_RAW.
            width, height: 1 to 65535 pixels.
            label: the class index, 0 or more.
            payload: the JPEG stream, or height x width x 3 bytes of RGB; at most MAX_PAGE_BYTES.

        Errors: DataError if the disk is full.
        """
        if len(payload) > MAX_PAGE_BYTES:
            raise ValueError(f"{len(payload)} bytes do not fit the largest page of {MAX_PAGE_BYTES}")
        while self.page_bytes < len(payload):
            self.page_bytes *= 2
        left = -self._position % self.page_bytes
        if left < len(payload):
            self._write(lambda: self._file.write(bytes(left)))
            self._position += left
        self._write(lambda: self._file.write(payload))
        self._metadata[self.num_samples] = (mode, width, height, self._position, label)
        self._checksums[self.num_samples] = checksum(payload)
        self._sizes[self.num_samples] = len(payload)
        self._position += len(payload)
        self.num_samples += 1

    def finish(self) -> None:
        """Write the tables and bring the file to the disk (fsync). Errors: DataError as in `add`."""
        rows = self._metadata[: self.num_samples]
        allocations = np.zeros(self.num_samples, ALLOCATION)
        allocations["sample_id"] = np.arange(self.num_samples)
        allocations["ptr"] = rows["data_ptr"]
        allocations["size"] = self._sizes[: self.num_samples]
        header = np.array((VERSION, len(FIELDS), self.page_bytes, self.num_samples, self._position), HEADER)
        fields = np.zeros(len(FIELDS), FIELD)
        for row, (name, type_id) in zip(fields, FIELDS, strict=True):
            row["type_id"], row["name"] = type_id, name

        def write() -> None:
            self._file.write(allocations.data)
            self._file.seek(0)
            self._file.write(header.tobytes() + fields.tobytes())
            self._file.write(rows.data)
            self._file.write(self._checksums[: self.num_samples].data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

        self._write(write)

    def close(self) -> None:
        """Close the file as it stands; for a conversion that failed. Does nothing after `finish`."""
        with suppress(OSError):  # what is still buffered may not fit on a full disk, and is not wanted
            self._file.close()

    def _write(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error


def read_tables(file: HeldFile | Path, *, with_checksums: bool = False) -> BetonTables:
    """The tables of a .beton file, every row checked against the file's bounds.

    Args: `with_checksums` whether the samples' checksums stand behind the metadata, as the manifest says.
    Errors: DataError naming the file and, for a bad row, the sample.
    """
    with closing(HeldFile(file)) if isinstance(file, Path) else nullcontext(file) as held:
        header, front, back = _read_parts(held, with_checksums)
    path, num_bytes, num_samples = held.path, held.num_bytes, int(header["num_samples"])
    metadata = np.frombuffer(front, METADATA, num_samples, METADATA_START)
    checksums = (
        np.frombuffer(front, CHECKSUM, num_samples, METADATA_START + metadata.nbytes).copy()
        if with_checksums
        else None
    )
    allocations = np.frombuffer(back, ALLOCATION)
    page_size, alloc_ptr = int(header["page_size"]), int(header["alloc_table_ptr"])
    order = np.argsort(allocations["sample_id"], kind="stable")  # FFCV's own writer leaves them in any order
    if not np.array_equal(allocations["sample_id"][order], np.arange(num_samples, dtype=np.uint64)):
        raise _damaged(path, "its allocation table does not list every sample once")
    ptrs, sizes = metadata["data_ptr"].copy(), allocations["size"][order]
    widths, heights = metadata["width"].copy(), metadata["height"].copy()
    raw_sizes = widths.astype(np.uint64) * heights.astype(np.uint64) * np.uint64(3)
    raw = metadata["mode"] == IMAGE_RAW
    # Sizes are compared with what is left behind the pointer, so that no sum can wrap around.
    checks = (
        (metadata["mode"] <= IMAGE_RAW, "has an image mode that is neither JPEG nor raw"),
        ((widths > 0) & (heights > 0), "has no width or height"),
        (metadata["label"] >= 0, "has a negative label"),
        (allocations["ptr"][order] == ptrs, "has two different addresses"),
        ((ptrs >= len(front)) & (ptrs < min(alloc_ptr, num_bytes)), "points outside the image bytes"),
        (
            (sizes > 0) & (sizes <= np.uint64(alloc_ptr) - np.minimum(ptrs, alloc_ptr)),
            "reaches outside the image bytes",
        ),
        (sizes <= np.uint64(page_size) - ptrs % np.uint64(page_size), "straddles a page"),
        (~raw | (sizes == raw_sizes), "is raw and not 3 bytes a pixel"),
    )
    for good, what in checks:
        if not good.all():
            raise _damaged(path, f"sample {int(np.argmin(good))} {what}")
    return BetonTables(
        num_samples=num_samples,
        page_size=page_size,
        modes=metadata["mode"].copy(),
        widths=widths,
        heights=heights,
        labels=metadata["label"].copy(),
        data_ptrs=ptrs,
        data_sizes=sizes,
        checksums=checksums,
        sha256=hashlib.sha256(front + back).hexdigest(),
    )


def _read_parts(file: HeldFile, with_checksums: bool) -> tuple[np.void, bytes, bytes]:
    """The header, all tables before the image bytes, and the allocation table, after checking that they are there."""
    path, num_bytes = file.path, file.num_bytes
    if num_bytes < METADATA_START:
        raise _damaged(path, f"it has {num_bytes} bytes, fewer than a header")
    start = file.read(0, METADATA_START)
    header = np.frombuffer(start, HEADER, 1)[0]
    fields = np.frombuffer(start, FIELD, len(FIELDS), HEADER.itemsize)
    found = tuple((bytes(row["name"]), int(row["type_id"])) for row in fields)
    if header["version"] != VERSION:
        raise _damaged(path, f"its version is {header['version']}, not {VERSION}")
    if header["num_fields"] != len(FIELDS) or found != FIELDS:
        raise _damaged(path, "its fields are not an RGB `image` and an integer `label`")
    page_size, num_samples = int(header["page_size"]), int(header["num_samples"])
    if page_size < MIN_PAGE_BYTES or page_size & (page_size - 1):
        raise _damaged(
            path, f"its page size of {page_size} is not a power of two of at least {MIN_PAGE_BYTES}"
        )
    alloc_ptr = int(header["alloc_table_ptr"])
    front_bytes = num_samples * (METADATA.itemsize + with_checksums * CHECKSUM.itemsize)
    if METADATA_START + front_bytes > alloc_ptr:
        raise _damaged(
            path, f"its {num_samples} samples do not fit before the allocation table at {alloc_ptr}"
        )
    if alloc_ptr + num_samples * ALLOCATION.itemsize != num_bytes:
        raise _damaged(
            path, f"its allocation table does not end with the file ({num_bytes} bytes): it was cut short"
        )
    front = start + file.read(METADATA_START, front_bytes)
    return header, front, file.read(alloc_ptr, num_samples * ALLOCATION.itemsize)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: not a whole .beton file of fast_essl: {what}; convert it again")
