"""The manifest beside a .beton file: what it holds, whence it came, and checksums by which damage is found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Final

from loaders.beton import IMAGE_RAW, BetonTables, read_tables, table_bytes
from loaders.errors import DataError
from loaders.jpeg import check_jpeg, read_frame
from loaders.machine import num_cores

FORMAT_VERSION: Final = 1
BLOCK_BYTES: Final = 1 << 23
NUM_SAMPLED_BLOCKS: Final = 4
_AGAIN: Final = "restore it from a copy or convert it again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `<name>.beton.json` says of `<name>.beton`."""

    format_version: int
    num_samples: int
    num_bytes: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    source: str
    options: dict[str, Any]
    """The options of the conversion and the versions of what decoded and encoded."""
    storage: dict[str, int]
    """How many samples were copied byte for byte, encoded as JPEG, and stored as raw pixels."""
    block_bytes: int
    block_sha256: tuple[str, ...]
    """SHA-256 of each `block_bytes` of the file; the last block may be shorter."""
    tables_sha256: str
    """SHA-256 of header, field descriptors, metadata and allocation table."""
    skipped: tuple[dict[str, str], ...]
    """`name` and `reason` of each image that was left out."""
    created: str
    """ISO 8601, UTC."""

    @property
    def digest(self) -> str:
        """Identifies the data set by its content: the same bytes and class names give the same digest."""
        content = [self.tables_sha256, *self.block_sha256, json.dumps(self.class_names)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    @staticmethod
    def load(beton_path: Path) -> Manifest:
        """Read the manifest of a .beton file.

        Errors: DataError if it is missing or not one of this version.
        """
        path = manifest_path(beton_path)
        if not beton_path.is_file():
            raise DataError(
                f"{beton_path}: no such file; make it with `fast-essl convert SOURCE {beton_path}`"
            )
        if not path.is_file():
            raise DataError(
                f"{beton_path}: its manifest {path.name} is missing; bring both files, or convert again"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from error
        names = [field.name for field in fields(Manifest)]
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: not a manifest of version {FORMAT_VERSION}; convert again with this fast_essl"
            )
        if set(values) != set(names):
            raise DataError(f"{path}: wrong or missing keys {sorted(set(values) ^ set(names))}; {_AGAIN}")
        content: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return Manifest(**content)

    def to_json(self) -> str:
        """The manifest as the text of its file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def manifest_path(beton_path: Path) -> Path:
    """Where the manifest of a .beton file stands: beside it, with `.json` behind the whole name."""
    return beton_path.with_name(beton_path.name + ".json")


def checksums(beton_path: Path) -> tuple[tuple[str, ...], str]:
    """Re-read a .beton file: (block_sha256, tables_sha256) as the manifest keeps them."""
    num_blocks = -(-beton_path.stat().st_size // BLOCK_BYTES)
    blocks = tuple(_block_sha256(beton_path, index, BLOCK_BYTES) for index in range(num_blocks))
    return blocks, _tables_sha256(beton_path)


def check_opening(beton_path: Path) -> Manifest:
    """Refuse a file that does not match its manifest: size, counts, tables, a few blocks spread over the file.

    Returns the manifest. Errors: DataError, one line that names the file and says what to do.
    """
    manifest, _ = _check_tables(beton_path)
    num_blocks = len(manifest.block_sha256)
    last = num_blocks - 1
    sampled = {last * step // max(NUM_SAMPLED_BLOCKS - 1, 1) for step in range(NUM_SAMPLED_BLOCKS)}
    for index in sorted(sampled):
        _check_block(beton_path, manifest, index)
    return manifest


def verify(beton_path: Path, *, num_threads: int = 0) -> Manifest:
    """Re-read a whole file: every block against its checksum, every image by decoding it.

    Args:
        num_threads: 0 = all cores. Hashing and decoding release the interpreter lock.

    Errors: DataError naming the first bad block or sample by its index.
    """
    manifest, tables = _check_tables(beton_path)
    # A block of the file, and an image of the largest size, are held by each thread at a time.
    with ThreadPoolExecutor(num_threads or num_cores()) as pool:
        for chunk in _chunks(range(len(manifest.block_sha256))):
            for _ in pool.map(lambda index: _check_block(beton_path, manifest, index), chunk):
                pass
        descriptor = os.open(beton_path, os.O_RDONLY)
        try:
            for chunk in _chunks(range(tables.num_samples)):
                for index, wrong in zip(
                    chunk, pool.map(lambda i: _check_image(descriptor, tables, i), chunk), strict=True
                ):
                    if wrong:
                        raise DataError(f"{beton_path}: sample {index} does not decode ({wrong}); {_AGAIN}")
        finally:
            os.close(descriptor)
    return manifest


def _chunks(indices: range, size: int = 1024) -> Iterator[list[int]]:
    """Runs of `indices`, so that the pool's queue stays short."""
    remaining = iter(indices)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _check_tables(beton_path: Path) -> tuple[Manifest, BetonTables]:
    manifest = Manifest.load(beton_path)
    num_bytes = beton_path.stat().st_size
    if num_bytes != manifest.num_bytes:
        raise DataError(
            f"{beton_path}: {num_bytes} bytes where its manifest says {manifest.num_bytes}; {_AGAIN}"
        )
    if len(manifest.block_sha256) * manifest.block_bytes < num_bytes:
        raise DataError(f"{manifest_path(beton_path)}: lists too few blocks for {num_bytes} bytes; {_AGAIN}")
    tables = read_tables(beton_path)
    if _tables_sha256(beton_path) != manifest.tables_sha256:
        raise DataError(f"{beton_path}: its tables do not match the checksum in its manifest; {_AGAIN}")
    num_classes = len(manifest.class_names)
    largest = int(tables.labels.max(initial=-1))
    if tables.num_samples != manifest.num_samples or sum(manifest.class_counts) != manifest.num_samples:
        raise DataError(
            f"{beton_path}: {tables.num_samples} samples, its manifest says {manifest.num_samples}; {_AGAIN}"
        )
    if largest >= num_classes or len(manifest.class_counts) != num_classes:
        raise DataError(
            f"{beton_path}: label {largest} is not one of the {num_classes} classes in its manifest; {_AGAIN}"
        )
    return manifest, tables


def _check_block(beton_path: Path, manifest: Manifest, index: int) -> None:
    if _block_sha256(beton_path, index, manifest.block_bytes) != manifest.block_sha256[index]:
        start = index * manifest.block_bytes
        raise DataError(
            f"{beton_path}: block {index} (from byte {start}) does not match its checksum; {_AGAIN}"
        )


def _check_image(descriptor: int, tables: BetonTables, index: int) -> str:
    """What is wrong with the stored image of sample `index`, or ""."""
    if tables.modes[index] == IMAGE_RAW:
        return ""  # its size was checked with the tables, and any bytes are pixels
    data = os.pread(descriptor, int(tables.data_sizes[index]), int(tables.data_ptrs[index]))
    frame = read_frame(data)
    if frame is None:
        return "it has no frame header"
    width, height = int(tables.widths[index]), int(tables.heights[index])
    if (frame.width, frame.height) != (width, height):
        return f"it is {frame.width}x{frame.height}, the tables say {width}x{height}"
    return "".join(check_jpeg(data, frame))


def _block_sha256(path: Path, index: int, block_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(index * block_bytes)
        return hashlib.sha256(file.read(block_bytes)).hexdigest()


def _tables_sha256(path: Path) -> str:
    front, back = table_bytes(path)
    return hashlib.sha256(front + back).hexdigest()
