"""The rooms before the training device: storage read, decode, crops, and the loader that does all three.

Decode and crops are the loader's own compiled functions (`loaders.cut`), run over the same samples with the same
number of threads and nothing else beside them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from fast_essl.bench.measuring import Row, measure
from fast_essl.bench.storage import Span, drop_from_memory, read_spans, resident_share
from fast_essl.config import Config
from fast_essl.evaluate_run import open_split
from loaders.batch import Crops
from loaders.beton import IMAGE_JPEG
from loaders.cut import decode_jpeg, resize_crop
from loaders.errors import DataError
from loaders.images import BetonImages
from loaders.machine import num_cores
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe

STORAGE_DISK = "storage, from disk"
STORAGE_MEMORY = "storage, from memory"
DECODE = "decode"
CROPS = "crops"
LOADER = "loader"
"""Names of the rows."""

MAX_DECODED_BYTES = 2**28
"""Of the images that the crops are cut from: a camera's full pictures would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Some samples of a file, in memory."""

    data: np.ndarray
    """(num_bytes,) uint8, one sample after the other."""
    starts: np.ndarray
    """(N,) int64, where each begins in `data`."""
    sizes: np.ndarray
    """(N,) int64 bytes."""
    heights: np.ndarray
    """(N,) int64 pixels."""
    widths: np.ndarray
    """(N,) int64 pixels."""

    @property
    def num_samples(self) -> int:
        return len(self.starts)


def choose(images: BetonImages, num_samples: int, *, jpeg_only: bool = False) -> np.ndarray:
    """Indices of at most `num_samples` samples, spread over the file, in random order."""
    there = np.arange(images.tables.num_samples)
    if jpeg_only:
        there = there[images.tables.modes == IMAGE_JPEG]
    spread = np.linspace(0, len(there), min(len(there), num_samples), endpoint=False).astype(np.int64)
    return np.random.default_rng(0).permutation(there[spread])


def spans_of(images: BetonImages, indices: np.ndarray) -> list[Span]:
    """Where these samples stand in the file."""
    tables = images.tables
    return [(int(tables.data_ptrs[index]), int(tables.data_sizes[index])) for index in indices]


def load_stored(images: BetonImages, indices: np.ndarray) -> Stored:
    """Read these samples, JPEG ones, into memory."""
    tables = images.tables
    with open(images.path, "rb") as file:
        blobs = [os.pread(file.fileno(), size, start) for start, size in spans_of(images, indices)]
    sizes = np.array([len(blob) for blob in blobs])
    return Stored(
        data=np.frombuffer(b"".join(blobs), np.uint8),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        heights=tables.heights[indices].astype(np.int64),
        widths=tables.widths[indices].astype(np.int64),
    )


@contextlib.contextmanager
def numba_threads(num_threads: int) -> Iterator[None]:
    """So many threads of numba's within the block."""
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def storage_rows(
    images: BetonImages, *, num_samples: int, num_threads: int, num_repeats: int
) -> tuple[list[Row], str]:
    """Reading samples in random order, from the disk where the page cache can be emptied of them, and from memory.

    Returns: the rows, and what is to be said of the page cache.
    """
    spans = spans_of(images, choose(images, num_samples))
    share = resident_share(images.path, [(0, images.manifest.num_bytes)])
    state = "page cache: " + (
        "not told, since the file is not ours" if share is None else f"{share:.0%} of the file was in memory"
    )

    def read() -> int:
        read_spans(images.path, spans, num_threads)
        return len(spans)

    def row(name: str, prepare: Callable[[], object] | None = None) -> Row:
        return measure(
            name,
            read,
            batch_size=1,
            num_repeats=num_repeats,
            bytes_per_sample=float(np.mean([size for _, size in spans])),
            prepare=prepare,
        )

    rows = []
    if drop_from_memory(images.path, spans):
        rows.append(row(STORAGE_DISK, lambda: drop_from_memory(images.path, spans)))
    else:
        state += "; the kernel does not drop its pages, so reading from the disk is not measured"
    return [*rows, row(STORAGE_MEMORY)], state


def decode_row(stored: Stored, *, num_threads: int, num_repeats: int) -> Row:
    """libjpeg-turbo alone, the accurate DCT, from memory."""

    def work() -> int:
        if decode_all(stored.data, stored.starts, stored.sizes, stored.heights, stored.widths):
            raise DataError("a sample does not decode; run 'fast-essl convert --verify' on the file")
        return stored.num_samples

    with numba_threads(num_threads):
        return measure(
            DECODE,
            work,
            batch_size=1,
            num_repeats=num_repeats,
            bytes_per_sample=float(stored.sizes.mean()),
        )


def crops_row(
    images: BetonImages,
    indices: np.ndarray,
    recipes: tuple[Recipe, ...],
    *,
    num_threads: int,
    num_repeats: int,
) -> Row:
    """All crops of the recipes, cut and resized from images that are decoded already."""
    num_bytes = 3 * images.heights[indices].astype(np.int64) * images.widths[indices]
    indices = indices[: max(1, int((num_bytes.cumsum() <= MAX_DECODED_BYTES).sum()))]
    heights, widths = images.heights[indices], images.widths[indices]
    decoded = [np.asarray(images.image(int(index))) for index in indices]
    pixels = np.concatenate([image.reshape(-1) for image in decoded])
    starts = np.cumsum([image.size for image in decoded]) - [image.size for image in decoded]
    epochs = itertools.count()
    sizes = np.array([recipe.size for recipe in recipes])
    cubic = np.array([recipe.interpolation == "bicubic" for recipe in recipes], dtype=np.uint8)

    def work() -> int:
        boxes = draw_parameters(
            recipes, seed=0, epoch=next(epochs), indices=indices, heights=heights, widths=widths
        ).box
        crop_all(pixels, starts, heights.astype(np.int64), widths.astype(np.int64), boxes, sizes, cubic)
        return len(indices)

    with numba_threads(num_threads):
        return measure(
            CROPS,
            work,
            batch_size=1,
            num_repeats=num_repeats,
            bytes_per_sample=float(3 * (sizes**2).sum()),
        )


def loader_row(
    config: Config, recipes: tuple[Recipe, ...], *, batch_size: int, num_samples: int, num_repeats: int
) -> Row:
    """The configured loader by itself, from opening on: about `num_samples` samples a repeat."""
    started = time.perf_counter()
    loader = open_split(config, "train", recipes, shuffle=True, batch_size=batch_size)
    opening_s = time.perf_counter() - started
    num_batches = -(-num_samples // batch_size)
    with contextlib.closing(loader), contextlib.closing(endless(loader)) as batches:

        def work() -> int:
            return sum(len(crops.labels) for crops in itertools.islice(batches, num_batches))

        return measure(
            LOADER,
            work,
            batch_size=batch_size,
            num_repeats=num_repeats,
            bytes_per_sample=float(loader.images.tables.data_sizes.mean()),
            opening_s=opening_s,
        )


def endless(loader: Any) -> Generator[Crops]:
    """Epoch after epoch of a loader; stretches of one stream begin and end with as many batches made ahead."""
    for epoch in itertools.count():
        with contextlib.closing(loader.epoch(epoch)) as batches:
            yield from batches


def num_workers(config: Config) -> int:
    """Threads of the loader."""
    return config.data.num_workers or num_cores()


@numba.njit(parallel=True, nogil=True, cache=True)
def decode_all(data, starts, sizes, heights, widths):  # type: ignore[no-untyped-def]
    """Decode these JPEGs with all threads; returns how many failed."""
    failed = 0
    for n in numba.prange(len(starts)):
        image = np.empty((heights[n], widths[n], 3), np.uint8)
        failed += decode_jpeg(data[starts[n] : starts[n] + sizes[n]], image) != 0
    return failed


@numba.njit(parallel=True, nogil=True, cache=True)
def crop_all(pixels, starts, heights, widths, boxes, sizes, cubic):  # type: ignore[no-untyped-def]
    """Cut and resize every crop of these decoded images with all threads, into memory that is then dropped."""
    for n in numba.prange(len(starts)):
        stop = starts[n] + 3 * heights[n] * widths[n]
        image = pixels[starts[n] : stop].reshape((heights[n], widths[n], 3))
        for crop in range(len(sizes)):
            out = np.empty((sizes[crop], sizes[crop], 3), np.uint8)
            resize_crop(image, boxes[n, crop], cubic[crop], out)
