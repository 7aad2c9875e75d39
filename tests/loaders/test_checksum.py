"""The compiled XXH3 against the xxhash package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import xxhash

from loaders.checksum import checksum

ROOT = Path(__file__).resolve().parents[2]


def test_every_length_up_to_a_block_and_longer_ones():
    random = np.random.default_rng(0)
    edges = [1024 * block + more for block in (2, 3, 8) for more in (-1, 0, 1, 63, 64, 65)]
    for size in [*range(1101), *edges, *random.integers(1100, 400_000, 40).tolist()]:
        data = random.bytes(size)
        assert checksum(data) == xxhash.xxh3_64_intdigest(data), size


def test_bytes_that_stand_anywhere_in_memory():
    data = np.random.default_rng(1).bytes(5000)
    for start in range(9):
        assert checksum(np.frombuffer(data, np.uint8)[start:]) == xxhash.xxh3_64_intdigest(data[start:])


def test_the_same_bits_for_any_processor(tmp_path):
    data = np.random.default_rng(2).bytes(70_000)
    script = "import sys; from loaders.checksum import checksum; print(checksum(sys.stdin.buffer.read()))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=data,
        cwd=ROOT,
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert int(run.stdout) == checksum(data)
