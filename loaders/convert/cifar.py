"""CIFAR-10 as its author publishes it: pickled batches, in an archive or unpacked.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import os
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import numpy.typing as npt

from loaders.convert.plain_pickle import PickleError, read_plain_pickle
from loaders.convert.source import Sample, Source
from loaders.errors import DataError
from loaders.names import printable

URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5: Final = "c58f30108f718f92721af3b95e74349a"
FOLDER: Final = "cifar-10-batches-py"
_BATCHES: Final = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_NAMES: Final = "batches.meta"
_BATCH_SAMPLES: Final = 10_000
# The files of a batch have 31 MB, the whole archive 186 MB.
_MAX_FILE_BYTES: Final = 1 << 26
_MAX_ARCHIVE_BYTES: Final = 1 << 29
_MAX_MEMBERS: Final = 1000


def open_cifar10(path: Path, split: str) -> Source:
    """The images of a CIFAR-10 archive or folder.

    Args:
        path: `cifar-10-python.tar.gz`, the folder `cifar-10-batches-py`, or the one that holds it.
        split: "train" or "test".

    Errors: DataError if the split is another, a batch is missing or damaged, or a pickle holds more than
    arrays.
    """
    if split not in _BATCHES:
        raise DataError(
            f"{path}: CIFAR-10 has no split {split!r}; give one of {', '.join(_BATCHES)} with --split"
        )
    class_names = _class_names(path)

    def samples() -> Iterator[Sample]:
        for batch in _BATCHES[split]:
            images, labels = _arrays(path, batch, len(class_names))
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Sample(f"{printable(path)}: {batch}, row {row}", label, np.ascontiguousarray(image))

    return Source(
        description=f"CIFAR-10 {split}, {printable(path)}",
        class_names=class_names,
        num_samples=len(_BATCHES[split]) * _BATCH_SAMPLES,
        samples=samples,
    )


def download(url: str, md5: str, folder: Path) -> Path:
    """Fetch the archive into `folder` unless it is there and whole.

    It appears under its name only when its MD5 is right. Returns its path.

    Errors: DataError if the address cannot be read or what it gives has another MD5.
    """
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file() and _md5(path) == md5:
        return path
    by_hand = f"fetch it by hand and give the path of {path.name} as the source"
    part = folder / f".{path.name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as file:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
        found = _md5(part)
        if found != md5:
            raise DataError(f"{url}: what came has the MD5 {found}, not {md5}; try again, or {by_hand}")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be fetched into {folder} ({error}); {by_hand}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """Where downloads are kept: `fast_essl` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_essl"


def _class_names(path: Path) -> tuple[str, ...]:
    names = _read(path, _NAMES).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{printable(path)}: {_NAMES} holds no `label_names`")
    try:
        return tuple(name.decode() if isinstance(name, bytes) else name for name in names)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(path)}: a class name in {_NAMES} is not UTF-8 ({error}); fetch it again"
        ) from error


def _arrays(path: Path, batch: str, num_classes: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """The images (N, 32, 32, 3) uint8 and labels of one batch."""
    values = _read(path, batch)
    data, labels = values.get("data"), values.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{path}: `data` of {batch} is not an array of rows of 3072 bytes")
    if not isinstance(labels, list) or len(labels) != len(data) or len(data) > _BATCH_SAMPLES:
        raise DataError(f"{path}: {batch} has not one label for each of at most {_BATCH_SAMPLES} images")
    if not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise DataError(f"{path}: a label in {batch} is not from 0 to {num_classes - 1}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _read(path: Path, name: str) -> dict[str, Any]:
    """Unpickle one file of the archive or folder."""
    try:
        if path.is_dir():
            folder = path if (path / _NAMES).is_file() else path / FOLDER
            data = _content(folder / name)
        else:
            with _unpacked(path) as file:
                data = _member(file, f"{FOLDER}/{name}")
    # A damaged archive makes tarfile recurse and compute with any number.
    except (
        OSError,
        EOFError,
        zlib.error,
        tarfile.TarError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{printable(path)}: {name} cannot be read from this CIFAR-10 python archive or folder ({reason}); "
            "fetch it again"
        ) from error
    try:
        return read_plain_pickle(data)
    except PickleError as error:
        raise DataError(
            f"{printable(path)}: {name} is damaged, or not of CIFAR-10 ({error}); fetch it again"
        ) from error


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{path.name} is missing or no file")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has over {_MAX_FILE_BYTES:,} bytes")
    return path.read_bytes()


def _unpacked(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_packed else path.open("rb")


def _member(file: IO[bytes], name: str) -> bytes:
    """A file of an archive. Errors: ValueError if it is not there, or the archive is larger than any of CIFAR-10."""
    with tarfile.open(fileobj=cast(IO[bytes], _Bounded(file)), mode="r:") as archive:
        for _ in range(_MAX_MEMBERS):
            member = archive.next()
            if member is None:
                break
            if member.name == name and member.isreg():
                content = archive.extractfile(member)
                if content is None or member.issparse() or member.size > _MAX_FILE_BYTES:
                    raise ValueError(f"{name} claims {member.size:,} bytes")
                data = content.read()
                if len(data) < member.size:
                    raise ValueError(f"{name} is cut short")
                return data
    raise ValueError(f"{name} is missing")


class _Bounded:
    """A file of which only so much is ever unpacked: a small archive may claim any size, and hold it as well."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, num_bytes: int) -> bytes:
        self._check(num_bytes, _MAX_FILE_BYTES)
        self._check(self._file.tell() + num_bytes, _MAX_ARCHIVE_BYTES)
        return self._file.read(num_bytes)

    def seek(self, position: int) -> int:
        self._check(position, _MAX_ARCHIVE_BYTES)
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, num_bytes: int, most: int) -> None:
        if not 0 <= num_bytes <= most:
            raise ValueError(f"it claims {num_bytes:,} bytes, and CIFAR-10 has fewer than {most:,}")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
