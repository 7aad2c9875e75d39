"""The manifest beside a .beton file: what it holds, whence it came, and checksums by which damage is found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.beton import IMAGE_RAW, BetonTables, read_tables
from loaders.checksum import checksum
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.jpeg import check_jpeg, read_frame
from loaders.machine import num_cores

FORMAT_VERSION: Final = 2
"""What `convert` writes: with a checksum for each sample in the .beton, and one of the manifest in itself."""
VERSION_WITHOUT_CHECKSUMS: Final = 1
"""What fast_essl 0.1.0 wrote, and can be read."""
BLOCK_BYTES: Final = 1 << 23
NUM_SAMPLED_BLOCKS: Final = 4
MAX_BLOCK_BYTES: Final = 1 << 30
AGAIN: Final = "restore it from a copy or convert it again"
_MAX_BYTES: Final = 1 << 28
"""Of a manifest: one that lists a million skipped images has half of that."""
_DIGEST: Final = "manifest_sha256"


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
    """SHA-256 of header, field descriptors, metadata, the samples' checksums and allocation table."""
    skipped: tuple[dict[str, str], ...]
    """`name` and `reason` of each image that was left out."""
    created: str
    """ISO 8601, UTC."""

    @property
    def digest(self) -> str:
        """Identifies the data set by its content: the same bytes and class names give the same digest."""
        content = [self.tables_sha256, *self.block_sha256, json.dumps(self.class_names)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def has_checksums(self) -> bool:
        """Whether the .beton has a checksum for each sample."""
        return self.format_version > VERSION_WITHOUT_CHECKSUMS

    @staticmethod
    def load(beton_path: Path) -> Manifest:
        """Read the manifest of a .beton file.

        Errors: DataError if it is missing, damaged, or not one of a version that can be read.
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
        return Manifest.read(path)

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a manifest by its own path. Errors: as `load`."""
        file = HeldFile(path)
        try:
            if file.num_bytes > _MAX_BYTES:
                raise DataError(f"{path}: {file.num_bytes} bytes are too many for a manifest; {AGAIN}")
            parsed = json.loads(file.read(0, file.num_bytes).decode())
            content: dict[str, Any] = dict(parsed) if isinstance(parsed, dict) else {}
            digest = content.pop(_DIGEST, None)
            content_sha256 = _content_sha256(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
        finally:
            file.close()
        version = content.get("format_version")
        if not _is_count(version) or version not in (VERSION_WITHOUT_CHECKSUMS, FORMAT_VERSION):
            raise DataError(
                f"{path}: not a manifest of version {VERSION_WITHOUT_CHECKSUMS} or {FORMAT_VERSION}; "
                "convert again with this fast_essl"
            )
        known = {field.name for field in fields(Manifest)}
        needed = {field.name for field in fields(Manifest) if field.default is MISSING}
        wrong = (set(content) - known) | (needed - set(content))
        if wrong:
            raise DataError(f"{path}: wrong or missing keys {sorted(wrong)}; {AGAIN}")
        for key, is_good, wanted in _KINDS:
            if not is_good(content[key]):
                raise DataError(f"{path}: {key} is not {wanted}; {AGAIN}")
        if version > VERSION_WITHOUT_CHECKSUMS and digest != content_sha256:
            raise DataError(
                f"{path}: does not match its own checksum {_DIGEST}: it was edited or damaged; {AGAIN}"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return Manifest(**values)

    def to_json(self) -> bytes:
        """The manifest as the bytes of its file."""
        values = asdict(self)
        values[_DIGEST] = _content_sha256(values)
        # A name of a skipped file that is not UTF-8 has surrogates, which JSON can only escape.
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def manifest_path(beton_path: Path) -> Path:
    """Where the manifest of a .beton file stands: beside it, with `.json` behind the whole name.

    Where a symbolic link has none beside it, that is beside the file that it leads to.

    Errors: DataError for "", "." and "/", which are no names.
    """
    if not beton_path.name:
        raise DataError(f"{beton_path}: is a folder; give the name of a .beton file")
    path = beton_path.with_name(beton_path.name + ".json")
    if beton_path.is_symlink() and not os.path.lexists(path):
        target = Path(os.path.realpath(beton_path))
        return target.with_name(target.name + ".json")
    return path


def next_manifest_path(beton_path: Path) -> Path:
    """Where the new manifest waits while a .beton file is replaced: see `loaders.convert.publish`."""
    path = manifest_path(beton_path)
    return path.with_name(path.name + ".next")


def _content_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_text(value: object) -> bool:
    """A text that can be written and printed."""
    return isinstance(value, str) and not any(0xD800 <= ord(character) < 0xE000 for character in value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_list(is_good: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_good, value))


def _is_skipped(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) >= {"name", "reason"}
        and all(isinstance(text, str) for text in value.values())
    )


_KINDS: Final = (
    ("num_samples", _is_count, "a number of samples"),
    ("num_bytes", _is_count, "a number of bytes"),
    ("class_names", _is_list(_is_text), "a list of names"),
    ("class_counts", _is_list(_is_count), "a list of numbers of images"),
    ("source", lambda value: isinstance(value, str), "a text"),
    ("options", lambda value: isinstance(value, dict), "a table"),
    (
        "storage",
        lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
        "a table of numbers of images",
    ),
    (
        "block_bytes",
        lambda value: _is_count(value) and 0 < value <= MAX_BLOCK_BYTES,
        "a number of bytes from 1 to 1 GiB",
    ),
    ("block_sha256", _is_list(_is_sha256), "a list of SHA-256 digests"),
    ("tables_sha256", _is_sha256, "a SHA-256 digest"),
    ("skipped", _is_list(_is_skipped), "a list of names and reasons"),
    ("created", _is_text, "a date"),
)


def block_checksums(file: HeldFile) -> tuple[str, ...]:
    """`block_sha256` as the manifest keeps it. Errors: DataError if the file cannot be read."""
    num_blocks = -(-file.num_bytes // BLOCK_BYTES)
    return tuple(_block_sha256(file, index, BLOCK_BYTES) for index in range(num_blocks))


def open_checked(beton_path: Path) -> tuple[HeldFile, Manifest, BetonTables]:
    """Open a file that matches its manifest: size, counts, labels, tables; without checksums, a few blocks as well.

    A conversion may be replacing the file at this very moment, or was killed while it did: the new manifest is then
    beside the old one, and the one that matches is taken.

    Errors: DataError, one line that names the file and says what to do.
    """
    first_error: DataError | None = None
    # The manifest that waits may get its name between our two looks, hence a third.
    for next_one in (False, True, False):
        if next_one and not next_manifest_path(beton_path).is_file():
            continue
        manifest = file = None
        try:
            manifest = (
                Manifest.read(next_manifest_path(beton_path)) if next_one else Manifest.load(beton_path)
            )
            file = HeldFile(beton_path)
            return file, manifest, _check_tables(file, manifest)
        except DataError as error:
            first_error = first_error or error
            if file is not None:
                file.close()
    assert first_error is not None
    raise first_error


def check_opening(beton_path: Path) -> Manifest:
    """The manifest of a file that matches it, as `open_checked`, which keeps the file open.

    Errors: DataError, one line that names the file and says what to do.
    """
    file, manifest, _ = open_checked(beton_path)
    file.close()
    return manifest


def verify(beton_path: Path, *, num_threads: int = 0) -> Manifest:
    """Re-read a whole file: every block and every sample against its checksum, every image by decoding it.

    Args:
        num_threads: 0 = all cores. Hashing and decoding release the interpreter lock.

    Errors: DataError naming the first bad block or sample by its index.
    """
    file, manifest, tables = open_checked(beton_path)
    # A block of the file, or an image of the largest size, is held by each thread at a time.
    with ThreadPoolExecutor(num_threads or num_cores()) as pool:
        for chunk in _chunks(range(len(manifest.block_sha256))):
            for _ in pool.map(lambda index: check_block(file, manifest, index), chunk):
                pass
        for chunk in _chunks(range(tables.num_samples)):
            reasons = pool.map(lambda index: _check_image(file, tables, index), chunk)
            for index, wrong in zip(chunk, reasons, strict=True):
                if wrong:
                    raise DataError(f"{beton_path}: sample {index} {wrong}; {AGAIN}")
    file.close()
    return manifest


def _chunks(indices: range, size: int = 1024) -> Iterator[list[int]]:
    """Runs of `indices`, so that the pool's queue stays short."""
    remaining = iter(indices)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _check_tables(file: HeldFile, manifest: Manifest) -> BetonTables:
    path = file.path
    if file.num_bytes != manifest.num_bytes:
        raise DataError(
            f"{path}: {file.num_bytes} bytes where its manifest says {manifest.num_bytes}; {AGAIN}"
        )
    num_blocks = -(-file.num_bytes // manifest.block_bytes)
    if len(manifest.block_sha256) != num_blocks:
        how = "few" if len(manifest.block_sha256) < num_blocks else "many"
        raise DataError(f"{manifest_path(path)}: lists too {how} blocks for {file.num_bytes} bytes; {AGAIN}")
    tables = read_tables(file, with_checksums=manifest.has_checksums)
    if tables.sha256 != manifest.tables_sha256:
        raise DataError(f"{path}: its tables do not match the checksum in its manifest; {AGAIN}")
    num_classes = len(manifest.class_names)
    largest = int(tables.labels.max(initial=-1))
    if tables.num_samples != manifest.num_samples or sum(manifest.class_counts) != manifest.num_samples:
        raise DataError(
            f"{path}: {tables.num_samples} samples, its manifest says {manifest.num_samples}; {AGAIN}"
        )
    if largest >= num_classes or len(manifest.class_counts) != num_classes:
        raise DataError(
            f"{path}: label {largest} is not one of the {num_classes} classes in its manifest; {AGAIN}"
        )
    counts = np.bincount(tables.labels, minlength=num_classes)
    if counts.tolist() != list(manifest.class_counts):
        label = int(np.argmax(counts != np.array(manifest.class_counts)))
        raise DataError(
            f"{path}: {counts[label]} images of class {manifest.class_names[label]!r}, its manifest says "
            f"{manifest.class_counts[label]}; {AGAIN}"
        )
    if not manifest.has_checksums:
        last = num_blocks - 1
        for index in sorted(
            {last * step // max(NUM_SAMPLED_BLOCKS - 1, 1) for step in range(NUM_SAMPLED_BLOCKS)}
        ):
            check_block(file, manifest, index)
    return tables


def check_block(file: HeldFile, manifest: Manifest, index: int) -> None:
    """Errors: DataError when the block does not match its SHA-256 in the manifest."""
    if _block_sha256(file, index, manifest.block_bytes) != manifest.block_sha256[index]:
        start = index * manifest.block_bytes
        raise DataError(
            f"{file.path}: block {index} (from byte {start}) does not match its checksum; {AGAIN}"
        )


def _check_image(file: HeldFile, tables: BetonTables, index: int) -> str:
    """What is wrong with the stored image of sample `index`, or ""."""
    data = file.read(int(tables.data_ptrs[index]), int(tables.data_sizes[index]))
    if tables.checksums is not None and checksum(data) != tables.checksums[index]:
        return "does not match its checksum"
    if tables.modes[index] == IMAGE_RAW:
        return ""  # its size was checked with the tables, and any bytes are pixels
    wrong = _check_jpeg(data, (int(tables.widths[index]), int(tables.heights[index])))
    return f"does not decode ({wrong})" if wrong else ""


def _check_jpeg(data: bytes, size: tuple[int, int]) -> str:
    frame = read_frame(data)
    if frame is None:
        return "it has no frame header"
    if (frame.width, frame.height) != size:
        return f"it is {frame.width}x{frame.height}, the tables say {size[0]}x{size[1]}"
    return "".join(check_jpeg(data, frame))


def _block_sha256(file: HeldFile, index: int, block_bytes: int) -> str:
    start = index * block_bytes
    return hashlib.sha256(file.read(start, min(block_bytes, file.num_bytes - start))).hexdigest()
