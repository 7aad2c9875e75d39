"""The view stage as its specification: readable torch, on any device; the other implementations are tested against it.

In order, in float32 on [0, 1], without rounding in between:

    flip → jitter (brightness, contrast, saturation, hue in each sample's own order, clamped after each)
         → grey → Gaussian blur → solarize → transformation → normalise

Jitter is torchvision's of float tensors (`adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `adjust_hue`); an
operation whose parameter is exactly its identity is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.batch import Crops, Views
from loaders.parameters import ViewParameters
from loaders.recipe import Recipe
from loaders.transformation import Transformation, crop_transformation

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Of red, green and blue; ITU-R BT.601, as torchvision rounds them."""
SOLARIZE_THRESHOLD = 128 / 255


def make_views(
    crops: Crops,
    recipes: tuple[Recipe, ...],
    *,
    equivariance: Transformation | None = None,
    invariance: Transformation | None = None,
    dtype: torch.dtype = torch.float32,
) -> Views:
    """Augment and normalise the crops, each by its own column of the parameter table.

    Args: `recipes` one a crop; with `equivariance` the last crop is not a view, but is transformed in all its ways,
    or, with its `one_copy`, each sample by the element that the table draws for it;
    with `invariance` each of the other crops is transformed by the element that the table draws for it; `dtype` of the
    result.
    Returns: `Views` on the device of the crops.
    """
    made, labels = [], None
    for number, (images, recipe) in enumerate(zip(crops.images, recipes, strict=True)):
        table = crops.parameters.view(number)
        transformation, labels = crop_transformation(
            table.element_word,
            is_last=number == len(recipes) - 1,
            equivariance=equivariance,
            invariance=invariance,
        )
        view = augment(images, table)
        if transformation is not None and labels is None:
            view = transformation.copies(view)
        elif transformation is not None and labels is not None:
            labels = labels.to(view.device)
            view = transformation.one_each(view, labels)
        made.append(normalise(view, recipe).to(dtype, memory_format=torch.channels_last))
    transformed = transformed_labels = None
    if equivariance is not None:
        transformed = made.pop()
        all_labels = equivariance.labels(len(crops.labels), crops.labels.device)
        transformed_labels = all_labels if labels is None else labels
    return Views(
        views=tuple(made),
        transformed=transformed,
        transformed_labels=transformed_labels,
        labels=crops.labels,
        indices=crops.indices,
    )


def augment(images: Tensor, parameters: ViewParameters) -> Tensor:
    """All of the specification before the transformation.

    Args: `images` (N, S, S, 3) uint8; `parameters` of one view, N rows.
    Returns: (N, 3, S, S) float32 in [0, 1].
    """
    x = images.permute(0, 3, 1, 2).float() / 255

    def on(rows: np.ndarray, operation: Callable[..., Tensor], values: np.ndarray | None = None) -> None:
        """Replace the chosen samples; `values` (N,) gives each its own strength."""
        chosen = torch.from_numpy(np.flatnonzero(rows)).to(x.device)
        if len(chosen) == 0:
            return
        if values is None:
            x[chosen] = operation(x[chosen])
        else:
            x[chosen] = operation(x[chosen], torch.from_numpy(values[rows]).to(x.device).view(-1, 1, 1, 1))

    on(parameters.flip == 1, lambda image: image.flip(3))
    operations = ((adjust_brightness, 1), (adjust_contrast, 1), (adjust_saturation, 1), (adjust_hue, 0))
    for step in range(4):
        for number, (operation, identity) in enumerate(operations):
            values = parameters.jitter[:, number]
            on((parameters.jitter_order[:, step] == number) & (values != identity), operation, values)
    on(parameters.grey == 1, lambda image: grey(image).expand_as(image))
    for n in np.flatnonzero(parameters.blur_sigma > 0):
        x[n] = gaussian_blur(x[n], float(parameters.blur_sigma[n]))
    on(parameters.solarize == 1, lambda image: torch.where(image >= SOLARIZE_THRESHOLD, 1 - image, image))
    return x


def adjust_brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Scale; (N, 3, H, W) in [0, 1], factors (N, 1, 1, 1)."""
    return (image * factor).clamp(0, 1)


def adjust_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean over each image of its grey."""
    mean = grey(image).mean(dim=(1, 2, 3), keepdim=True)
    return (image * factor + mean * (1 - factor)).clamp(0, 1)


def adjust_saturation(image: Tensor, factor: Tensor) -> Tensor:
    """Blend with each pixel's grey."""
    return (image * factor + grey(image) * (1 - factor)).clamp(0, 1)


def adjust_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by a share of the colour circle, through HSV (Foley et al., 1990)."""
    red, green, blue = image.unbind(dim=1)
    value, chroma = image.amax(dim=1), image.amax(dim=1) - image.amin(dim=1)
    divisor = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = (sextant + 6 * shift.view(-1, 1, 1)) % 6
    # Each channel falls from `value` by `chroma` over the part of the circle that is far from it.
    channels = [(offset + sextant) % 6 for offset in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], dim=1).clamp(
        0, 1
    )


def grey(image: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, 1, H, W)."""
    red, green, blue = (image[:, channel : channel + 1] for channel in range(3))
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue


def gaussian_weights(sigma: float, size: int) -> np.ndarray:
    """(2 · radius + 1,) float32 weights that sum to 1, the radius 3 sigma rounded up and at most size - 1."""
    radius = min(math.ceil(3 * sigma), size - 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur one (3, H, W) image, borders reflected without repeating the edge."""
    weights = torch.from_numpy(gaussian_weights(sigma, min(image.shape[1:]))).to(image)
    radius = len(weights) // 2
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1))[:, 0]


def normalise(image: Tensor, recipe: Recipe) -> Tensor:
    """(x - mean) / std by channel; (N, 3, H, W) in [0, 1]."""
    mean, std = (
        torch.tensor(values, device=image.device).view(3, 1, 1) for values in (recipe.mean, recipe.std)
    )
    return (image - mean) / std
