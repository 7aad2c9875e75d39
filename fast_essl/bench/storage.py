"""How fast a `.beton` file's samples can be read, from memory and from the disk, and how much of it is in memory.

Linux keeps what was read in the page cache. `mincore` tells which pages are there, `posix_fadvise` asks for their
removal; whether that was done is looked up, not believed. A hypervisor's or a disk's own cache stays out of sight.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
LARGEST_BLOCK = 2 << 20
Span = tuple[int, int]
"""(first byte, number of bytes) of a file."""


def resident_share(path: Path, spans: Sequence[Span]) -> float | None:
    """Share of these spans' pages that are in memory; None where the kernel does not tell.

    Since Linux 5.2 it tells only who may write to the file, and says "all" to anyone else.
    """
    if not os.access(path, os.W_OK):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    file = np.memmap(path, np.uint8, mode="r")
    present = total = 0
    for start, size in (_aligned(span, PAGE) for span in spans):
        states = np.empty(size // PAGE, np.uint8)
        if libc.mincore(file.ctypes.data + start, size, states.ctypes.data) != 0:
            return None
        present += int((states & 1).sum())
        total += len(states)
    return present / total


def drop_from_memory(path: Path, spans: Sequence[Span]) -> bool:
    """Ask the kernel to forget these spans; returns whether it did, to less than a twentieth of their pages.

    What lies around them, up to the next multiples of 2 MiB, is forgotten as well: pages are kept in blocks of up to
    that size, and a block goes as a whole or not at all.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a page that is not on the disk yet is not dropped
        for start, size in (_aligned(span, LARGEST_BLOCK) for span in spans):
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
    share = resident_share(path, spans)
    return share is not None and share < 0.05


def _aligned(span: Span, unit: int) -> Span:
    """A span with the rest of its first and its last unit."""
    start, size = span
    first = start - start % unit
    return first, -(-(start + size - first) // unit) * unit


def read_spans(path: Path, spans: Sequence[Span], num_threads: int) -> None:
    """Read these spans in their order, several threads at a time, as loaders do."""
    with open(path, "rb") as file, ThreadPoolExecutor(num_threads) as pool:
        for (_, size), data in zip(
            spans, pool.map(lambda span: os.pread(file.fileno(), span[1], span[0]), spans), strict=True
        ):
            if len(data) != size:
                raise OSError(f"{path}: ends early; run 'fast-essl convert --verify {path}'")
