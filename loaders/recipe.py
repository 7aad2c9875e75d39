"""Recipe: the augmentation settings of one view."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIDE = 4096
"""Of a view, pixels."""
MAX_FACTOR = 1000.0
"""Of a jitter, a ratio or a blur: far above what an image survives, far below where float32 overflows."""

CropMode = Literal["random", "center"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one view is cut from an image and augmented; every field but the crop's acts in the view stage.

    Errors: `ValueError` with the field's name for a value out of range.
    """

    size: int
    """Side of the square view, pixels."""
    crop: CropMode = "random"
    """`random`: a resized crop drawn from `scale` and `ratio`; `center`: the centred square."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the random crop's area, share of the image's area (Szegedy et al., 2015)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's width / height, drawn uniformly in its logarithm."""
    center_fraction: float = 1.0
    """Side of the centred square, share of the shorter image side (Resize 256, CenterCrop 224: 224/256)."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize, antialiased as Pillow's; on hard edges bicubic differs from it (see `loaders.cut`)."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability that the colour jitter is applied at all."""
    brightness: float = 0.4
    """Brightness factor is uniform in [max(0, 1 - b), 1 + b]."""
    contrast: float = 0.4
    """Contrast factor, likewise."""
    saturation: float = 0.4
    """Saturation factor, likewise."""
    hue: float = 0.1
    """Hue shift is uniform in [-h, h], share of the colour circle, at most 0.5."""
    grey_p: float = 0.2
    """Probability of conversion to grey."""
    blur_p: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, pixels of the view."""
    solarize_p: float = 0.0
    """Probability of solarization (levels of 128 and above are inverted)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from the channels, which are in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides the channels after `mean` is subtracted."""

    def __post_init__(self) -> None:
        for name, wrong, wanted in self._checks():
            if wrong:
                raise ValueError(f"{name} = {getattr(self, name)!r}: {wanted}")

    def _checks(self) -> list[tuple[str, bool, str]]:
        checks = [
            ("size", not 1 <= self.size <= MAX_SIDE, f"must be from 1 to {MAX_SIDE} pixels"),
            ("crop", self.crop not in ("random", "center"), "must be 'random' or 'center'"),
            (
                "interpolation",
                self.interpolation not in ("bilinear", "bicubic"),
                "must be 'bilinear' or 'bicubic'",
            ),
            ("scale", not 0 < self.scale[0] <= self.scale[1] <= 1, "must be 0 < low <= high <= 1"),
            (
                "ratio",
                not 1 / MAX_FACTOR <= self.ratio[0] <= self.ratio[1] <= MAX_FACTOR,
                f"must be {1 / MAX_FACTOR:g} <= low <= high <= {MAX_FACTOR:g}",
            ),
            ("center_fraction", not 0 < self.center_fraction <= 1, "must be in (0, 1]"),
            ("hue", not 0 <= self.hue <= 0.5, "must be in [0, 0.5]"),
            (
                "blur_sigma",
                not 1 / MAX_FACTOR <= self.blur_sigma[0] <= self.blur_sigma[1] <= MAX_FACTOR,
                f"must be {1 / MAX_FACTOR:g} <= low <= high <= {MAX_FACTOR:g} pixels",
            ),
            (
                "mean",
                not all(abs(value) <= MAX_FACTOR for value in self.mean),
                f"must be from -{MAX_FACTOR:g} to {MAX_FACTOR:g}",
            ),
            (
                "std",
                not all(1 / MAX_FACTOR <= value <= MAX_FACTOR for value in self.std),
                f"must be above 0, from {1 / MAX_FACTOR:g} to {MAX_FACTOR:g}",
            ),
        ]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_p"):
                checks.append((field.name, not 0 <= value <= 1, "must be a probability in [0, 1]"))
        for name in ("brightness", "contrast", "saturation"):
            inside = 0 <= getattr(self, name) <= MAX_FACTOR
            checks.append((name, not inside, f"must be 0 or more, at most {MAX_FACTOR:g}"))
        return checks

    @staticmethod
    def evaluation(
        size: int,
        center_fraction: float = 1.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        interpolation: Interpolation = "bilinear",
    ) -> Recipe:
        """The deterministic recipe that evaluation uses: the centred square, resized, nothing else."""
        return Recipe(
            size=size,
            crop="center",
            center_fraction=center_fraction,
            interpolation=interpolation,
            flip_p=0.0,
            jitter_p=0.0,
            grey_p=0.0,
            mean=mean,
            std=std,
        )
