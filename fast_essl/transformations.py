"""Transformations: the finite groups and sets that features are made sensitive to, or insensitive.

Each is a function from images to all their transformed copies; the position of a copy is its label. Used for
equivariance, the head tells the label, and a step costs 2 + |G| backbone passes a sample, the |G| on the small third
crop; used for invariance, each view gets a random element, which costs nothing. See CONTRIBUTING.md for adding one.

Source: the study of the paper's figure 1 and section 5; the cyclic translations are of its photonics experiment.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from fast_essl.config import Config, ConfigError
from loaders.errors import DataError
from loaders.transformation import Transformation, TransformationFunction, apply, error_in
from loaders.views import reference

BLUR_SIGMA = 1 / 16
"""Standard deviation of `gaussian_blur` as a share of the image's side: 2 pixels of 32."""


def four_fold_rotation(images: Tensor) -> list[Tensor]:
    """Quarter turns: 0°, 90°, 180°, 270°, counter-clockwise as `torch.rot90`."""
    return [torch.rot90(images, k, (2, 3)) for k in range(4)]


def horizontal_flip(images: Tensor) -> list[Tensor]:
    """As it is; mirrored left to right."""
    return [images, images.flip(3)]


def vertical_flip(images: Tensor) -> list[Tensor]:
    """As it is; mirrored top to bottom."""
    return [images, images.flip(2)]


def four_flips(images: Tensor) -> list[Tensor]:
    """As it is; mirrored top to bottom; left to right; both."""
    return [images, images.flip(2), images.flip(3), images.flip(2, 3)]


def jigsaw(images: Tensor) -> list[Tensor]:
    """The quarters of the image in all 24 orders, permutations in lexicographic order: 2×2 jigsaw.

    Copy (a, b, c, d) shows quarter a top left, b top right, c bottom left, d bottom right; they are numbered likewise.
    """
    _require_even(images)
    quarters = [quarter for half in images.chunk(2, dim=2) for quarter in half.chunk(2, dim=3)]
    return [
        torch.cat(
            [torch.cat([quarters[a], quarters[b]], dim=3), torch.cat([quarters[c], quarters[d]], dim=3)], 2
        )
        for a, b, c, d in permutations(range(4))
    ]


def half_swap(images: Tensor) -> list[Tensor]:
    """As it is; upper and lower half exchanged."""
    _require_even(images)
    upper, lower = images.chunk(2, dim=2)
    return [images, torch.cat([lower, upper], dim=2)]


def grayscale(images: Tensor) -> list[Tensor]:
    """In colour; grey."""
    return [images, reference.grey(images).expand_as(images)]


def colour_inversion(images: Tensor) -> list[Tensor]:
    """As it is; each level v as 1 - v."""
    return [images, 1 - images]


def gaussian_blur(images: Tensor) -> list[Tensor]:
    """Sharp; Gaussian blur, its standard deviation a sixteenth of the side."""
    sigma = BLUR_SIGMA * images.shape[-1]
    return [images, torch.stack([reference.gaussian_blur(image, sigma) for image in images])]


def cyclic_translations(images: Tensor) -> list[Tensor]:
    """Periodic images moved by (0, 0), (0, ½), (½, 0), (½, ½) periods down and to the right."""
    _require_even(images)
    half = images.shape[-1] // 2
    return [torch.roll(images, (down, right), (2, 3)) for down in (0, half) for right in (0, half)]


def _require_even(images: Tensor) -> None:
    if images.shape[-1] % 2:
        raise ValueError(f"needs images of an even side, not {images.shape[-1]} pixels")


TRANSFORMATIONS: dict[str, TransformationFunction] = {
    function.__name__: function
    for function in (
        four_fold_rotation,
        horizontal_flip,
        vertical_flip,
        four_flips,
        jigsaw,
        half_swap,
        grayscale,
        colour_inversion,
        gaussian_blur,
        cyclic_translations,
    )
}
"""The names that a configuration may use."""


def describe_transformations() -> str:
    """A table of all: elements, backbone passes of a sample when used for equivariance, what each label is."""
    lines = [f"{'transformation':<22}{'|G|':>4}{'passes':>8}  elements, by label"]
    for name, function in TRANSFORMATIONS.items():
        num_elements = len(function(torch.zeros(1, 3, 8, 8)))
        meaning = " ".join((function.__doc__ or "").split("\n")[0].split())
        lines.append(f"{name:<22}{num_elements:>4}{2 + num_elements:>8}  {meaning}")
    lines.append(
        "A pass of a copy is that of the small third crop. Use: --transformation.equivariance NAME (the head"
    )
    lines.append(
        "tells the element; --transformation.equivariance-elements chooses some), or --transformation.invariance"
    )
    lines.append("NAME (each view by a random element). NAME may be file.py:function, see CONTRIBUTING.md.")
    return "\n".join(lines)


def build_transformation(name: str, elements: tuple[int, ...] = (), *, size: int) -> Transformation:
    """A transformation by name, or by `file.py:function`, tried on images of the given side.

    Args: `elements` to use, in the order of their labels; () means all.
    Errors: `ConfigError` for an unknown name, elements that are not there, and images it does not allow.
    """
    function = _load_function(name) if ".py:" in name else TRANSFORMATIONS.get(name)
    if function is None:
        known = ", ".join(TRANSFORMATIONS)
        raise ConfigError(f"transformation {name!r} is unknown; choose one of {known}, or file.py:function")
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    try:
        results = apply(function, images, name=name)
    except DataError as error:
        raise ConfigError(str(error)) from None
    # By way of numpy, for example, which torch does not see.
    if not torch.equal(images, before):
        raise ConfigError(f"transformation {name!r}: changes the images that it is given; return others")
    if not all(bool(result.isfinite().all()) for result in results):
        raise ConfigError(f"transformation {name!r}: makes NaN or infinity of levels in [0, 1]")
    elements = elements or tuple(range(len(results)))
    if (
        len(elements) < 2
        or len(set(elements)) < len(elements)
        or not set(elements) <= set(range(len(results)))
    ):
        raise ConfigError(
            f"transformation {name!r}: its elements are 0 to {len(results) - 1}; choose two or more different "
            f"ones, not {list(elements)}"
        )
    return Transformation(name=name, function=function, elements=elements, num_results=len(results))


def config_transformations(config: Config) -> tuple[Transformation | None, Transformation | None]:
    """What a configuration is equivariant and invariant to; None for nothing.

    Errors: `ConfigError` naming the field.
    """
    chosen = config.transformation
    equivariance = invariance = None
    try:
        if config.method.equivariance_weight > 0:
            equivariance = build_transformation(
                chosen.equivariance, chosen.equivariance_elements, size=config.views.transformed.size
            )
            equivariance = replace(equivariance, one_copy=chosen.equivariance_copies == "one")
    except ConfigError as error:
        raise ConfigError(f"transformation.equivariance: {error}") from None
    try:
        if chosen.invariance != "none":
            for size in {config.views.view1.size, config.views.view2.size, *config.views.sizes}:
                invariance = build_transformation(chosen.invariance, chosen.invariance_elements, size=size)
    except ConfigError as error:
        raise ConfigError(f"transformation.invariance: {error}") from None
    return equivariance, invariance


def _load_function(name: str) -> TransformationFunction:
    """The function of `file.py:function`."""
    path, _, function_name = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"transformation {name!r}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, MemoryError):
        raise
    # Also SystemExit, as of a script that was not meant to be imported.
    except BaseException as error:
        raise ConfigError(
            f"transformation {name!r}: {path} does not load: {error_in(spec.origin or path, error)}"
        ) from error
    function: TransformationFunction | None = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"transformation {name!r}: {path} has no function {function_name!r}")
    return function
