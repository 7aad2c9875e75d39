"""Photographs made of chance, for machines without data: they decode, resize and compress as ImageNet's do.

A dead-leaves picture (Lee, Mumford, Huang, "Occlusion Models for Natural Images", IJCV 2001): discs that hide one
another, with radii distributed as r^-3 so that edges come at all scales, each shaded and covered with a texture whose
amplitude falls as 1/f (Field, "Relations between the statistics of natural images", JOSA A 1987). Saved as most of
ImageNet's files are, in quality 96 without chroma subsampling; the mean of 110 kB at 500×375 pixels is set by the
textures' strength, which differs from picture to picture as the sizes of ImageNet's files do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from loaders.batch import Crops
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe

SIZES: Final = ((500, 375), (375, 500), (500, 333), (500, 375))
"""(width, height) of the pictures, in turn: three wide ones to a tall one."""
QUALITY: Final = 96
NUM_CLASSES: Final = 10
_RADII: Final = (18.0, 260.0)
_COVERED: Final = 4.0
"""Area of all discs by area of the picture: little is left to the ground."""
_SHARPNESS: Final = (0.15, 2.0)
"""Of a picture, log-uniform: multiplies its texture and noise, and so sets the size of its file."""
_TEXTURE_LEVELS: Final = (3.0, 25.0)
"""Standard deviation of the texture on a disc, levels of 255; log-uniform."""
_NOISE_LEVELS: Final = 1.0
"""The same of a sensor's noise, which is white and covers all; a colour's own is a quarter of it."""


def photograph(seed: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """One picture, (height, width, 3) uint8; the same for the same arguments."""
    random = np.random.default_rng([seed, width, height])
    texture = _texture(random, height, width)
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = random.uniform(40, 215)
    strength = np.full((height, width), _log_uniform(random, _TEXTURE_LEVELS), np.float32)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    # Colours of a scene are mostly of one light: grey levels, and a little saturation.
    palette = (random.uniform(20, 235, (6, 1)) + random.normal(0, 12, (6, 3))).clip(0, 255)
    radii = _radii(random, width * height)
    # The small ones last: a large disc at the end would hide the whole picture.
    for radius in radii[np.argsort(-radii + random.normal(0, radii.std(), len(radii)))]:
        y, x = random.uniform(0, height), random.uniform(0, width)
        top, bottom = max(0, int(y - radius)), min(height, int(y + radius) + 2)
        left, right = max(0, int(x - radius)), min(width, int(x + radius) + 2)
        down, across = rows[top:bottom, left:right] - y, columns[top:bottom, left:right] - x
        squeeze = random.uniform(0.4, 1.0)
        # One pixel of soft edge, as a lens gives.
        cover = (radius - np.sqrt(down**2 + (across / squeeze) ** 2) + 0.5).clip(0, 1)
        light = (random.uniform(-30, 30) * down + random.uniform(-30, 30) * across) / radius
        colour = palette[random.integers(len(palette))] + random.normal(0, 4, 3)
        disc = colour + light[..., None]
        picture[top:bottom, left:right] += cover[..., None] * (disc - picture[top:bottom, left:right])
        rough = _log_uniform(random, _TEXTURE_LEVELS)
        strength[top:bottom, left:right] += cover * (rough - strength[top:bottom, left:right])
    noise = random.standard_normal((height, width, 1)) + random.standard_normal((height, width, 3)) / 4
    picture += _log_uniform(random, _SHARPNESS) * (strength[..., None] * texture + _NOISE_LEVELS * noise)
    return picture.clip(0, 255).astype(np.uint8)


def write_jpegs(folder: Path, num_samples: int) -> Path:
    """Make photographs 0, 1, 2, … as an image folder of ten classes. Returns the folder. Errors: `OSError`."""
    for number in range(num_samples):
        file = folder / f"class{number % NUM_CLASSES}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(photograph(number, *SIZES[number % len(SIZES)]))
        picture.save(file, quality=QUALITY, subsampling=0)
    return folder


def repeat_files(source: Path, folder: Path, passes: int) -> Path:
    """An image folder with each file of another one several times, by links. Returns it. Errors: `OSError`."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            for number in range(passes):
                link = folder / file.parent.name / f"{number}-{file.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    return folder


def make_crops(recipes: tuple[Recipe, ...], batch_size: int, *, epoch: int = 0) -> Crops:
    """One batch as a loader would give it, on the CPU: patches of a photograph, and the parameters of an epoch."""
    random = np.random.default_rng(0)
    side = max(512, 2 * max(recipe.size for recipe in recipes))
    picture = photograph(0, side, side)

    def patch(size: int) -> npt.NDArray[np.uint8]:
        top, left = random.integers(side - size + 1, size=2)
        return picture[top : top + size, left : left + size]

    indices = np.arange(batch_size)
    sides = np.full(batch_size, side)
    return Crops(
        images=tuple(
            torch.from_numpy(np.stack([patch(recipe.size) for _ in range(batch_size)])) for recipe in recipes
        ),
        labels=torch.from_numpy(indices % NUM_CLASSES),
        indices=torch.from_numpy(indices),
        parameters=draw_parameters(
            recipes, seed=0, epoch=epoch, indices=indices, heights=sides, widths=sides
        ),
    )


def _texture(random: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """(height, width, 3) of mean 0 and deviation 1, its amplitude falling as 1/f; the channels nearly agree."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(2):
        spectrum = np.fft.rfft2(random.standard_normal((height, width))) / frequency
        channel = np.fft.irfft2(spectrum, (height, width))
        channels.append(channel / channel.std())
    tint = random.normal(0, 0.1, 3)
    mixed = channels[0][..., None] + channels[1][..., None] * tint
    return (mixed / mixed.std()).astype(np.float32)


def _radii(random: np.random.Generator, area: int) -> npt.NDArray[np.float64]:
    """Radii of discs that cover `area` `_COVERED` times, distributed as r^-3 within `_RADII`."""
    low, high = _RADII
    # Mean area of a disc whose radius has that density: pi · ∫ r^-1 / ∫ r^-3.
    mean_area = np.pi * np.log(high / low) / ((low**-2 - high**-2) / 2)
    share = random.uniform(size=int(_COVERED * area / mean_area))
    return (low**-2 - share * (low**-2 - high**-2)) ** -0.5


def _log_uniform(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(random.uniform(*np.log(bounds))))
