"""CIFAR-10 as its author publishes it: pickled batches, in an archive or unpacked.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from loaders.convert.source import Sample, Source
from loaders.errors import DataError

URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5: Final = "c58f30108f718f92721af3b95e74349a"
FOLDER: Final = "cifar-10-batches-py"
_BATCHES: Final = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_NAMES: Final = "batches.meta"
_BATCH_SAMPLES: Final = 10_000
# All that a pickled array of numbers needs. Everything else is refused, for unpickling calls what it names.
_ADMITTED: Final = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


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
    names = _read(path, _NAMES).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{path}: {_NAMES} holds no `label_names`")

    def samples() -> Iterator[Sample]:
        for batch in _BATCHES[split]:
            images, labels = _arrays(path, batch, len(names))
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Sample(f"{path}: {batch}, row {row}", label, np.ascontiguousarray(image))

    return Source(
        description=f"CIFAR-10 {split}, {path}",
        class_names=tuple(name.decode() if isinstance(name, bytes) else name for name in names),
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


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of CIFAR-10 does")
        return super().find_class(module, name)


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
            return _unpickle((folder / name).open("rb"))
        with tarfile.open(path, "r:*") as archive:
            return _unpickle(archive.extractfile(f"{FOLDER}/{name}") or io.BytesIO())
    except (OSError, KeyError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{path}: not a whole CIFAR-10 python archive or folder ({error}); fetch it again"
        ) from error
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: {name} is damaged, or not of CIFAR-10 ({error}); fetch it again") from error


def _unpickle(file: IO[bytes]) -> dict[str, Any]:
    """A pickled dictionary with its keys as text (Python 2 wrote them as bytes)."""
    with file:
        values = _ArrayUnpickler(file, encoding="bytes").load()
    if not isinstance(values, dict):
        raise pickle.UnpicklingError("it is not a dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
