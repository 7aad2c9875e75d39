"""Helpers that tests import by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth colour fields with an edge and a little noise: JPEG and resizing treat it like a photograph."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(
        np.float32
    )
    pixels[height // 3 :, width // 2 :] *= 0.6
    pixels += random.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def parity(name: str) -> Any:
    """The arrays of a file of reference numbers, by name; the test is skipped where the file is not there."""
    path = SHARED / "parity" / f"{name}.npz"
    if not path.exists():
        pytest.skip("needs ../shared/parity")
    return np.load(path)


def assert_close(tensor: Any, expected: Any, relative: float = 1e-9) -> None:
    """A tensor equals an array, up to a share of the array's largest value."""
    expected = np.asarray(expected)
    assert np.abs(np.asarray(tensor.detach()) - expected).max() <= relative * np.abs(expected).max()
