"""Transformation: a finite set of transformations of square images, as the view stage applies it.

The sets themselves stand in `fast_essl.transformations`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TransformationFunction = Callable[[Tensor], Sequence[Tensor]]
"""(N, C, S, S) images in [0, 1] → one such tensor an element, in the order of the labels.

Errors: `ValueError` for a side that it does not allow. It leaves its argument as it is.
"""


@dataclass(frozen=True, kw_only=True)
class Transformation:
    """The elements to use of a transformation function."""

    name: str
    function: TransformationFunction
    elements: tuple[int, ...]
    """Numbers of the function's results to use; the position in this tuple is the label."""
    one_copy: bool = False
    """Equivariance: whether a step makes one copy of each sample, by an element drawn for it, instead of all |G|."""

    @property
    def num_elements(self) -> int:
        """|G|."""
        return len(self.elements)

    def copies(self, images: Tensor) -> Tensor:
        """(N, C, S, S) → (|G|·N, C, S, S): all samples by the first element, then by the second, …"""
        results = self.function(images)
        return torch.cat([results[element] for element in self.elements])

    def one_each(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N, C, S, S) images, (N,) int64 labels → (N, C, S, S): each sample by the element of its own label."""
        copies = self.copies(images).view(self.num_elements, *images.shape)
        return copies[labels, torch.arange(len(images), device=images.device)]

    def labels(self, num_samples: int, device: torch.device | None = None) -> Tensor:
        """(|G|·N,) int64, the label of each of `copies`."""
        return torch.arange(self.num_elements, device=device).repeat_interleave(num_samples)

    def drawn_labels(self, words: np.ndarray) -> Tensor:
        """Uniform (N,) uint32 words → (N,) int64 labels, as good as uniform."""
        return (torch.from_numpy(words.astype(np.int64)) * self.num_elements) >> 32


def crop_transformation(
    words: np.ndarray,
    *,
    is_last: bool,
    equivariance: Transformation | None,
    invariance: Transformation | None,
) -> tuple[Transformation | None, Tensor | None]:
    """What a view stage does to a crop: the last one has the equivariance, if there is one, the others the invariance.

    Args: `words` (N,) uint32, the table's `element_word` of the crop.
    Returns: the transformation, if any, and the (N,) int64 labels, on the CPU, of the element that each sample gets;
    None for the labels means all copies.
    """
    transformation = equivariance if is_last and equivariance is not None else invariance
    if transformation is None or (transformation is equivariance and is_last and not equivariance.one_copy):
        return transformation, None
    return transformation, transformation.drawn_labels(words)


@functools.cache
def source_pixels(transformation: Transformation, size: int) -> Tensor | None:
    """Which pixel of the image each pixel of each copy comes from: (|G|, S·S) int64, row by row.

    None for a transformation that does more than move pixels about. With the table a view stage makes the copies
    without calling the function, at the price of a copy.
    """
    num_pixels = size * size
    pixels = torch.arange(num_pixels)
    # Levels that float64 tells apart, each channel in another order: to pass, a function must move all channels alike.
    orders = torch.stack([pixels, pixels.flip(0), (pixels + num_pixels // 2) % num_pixels])
    images = (orders.double() / num_pixels).view(1, 3, size, size)
    copies = transformation.copies(images).view(transformation.num_elements, 3, num_pixels)
    table = (copies[:, 0] * num_pixels).round().long()
    if not ((table >= 0) & (table < num_pixels)).all():
        return None
    expected = images.view(3, num_pixels)[:, table].transpose(0, 1)
    return table if torch.equal(copies, expected) else None
