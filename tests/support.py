"""Helpers that tests import by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
