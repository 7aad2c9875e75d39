"""Transformation: a finite set of transformations of square images, as the view stage applies it.

The sets themselves stand in `fast_essl.transformations`.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loaders.errors import DataError

TransformationFunction = Callable[[Tensor], Sequence[Tensor]]
"""(N, C, S, S) images in [0, 1] → one such tensor an element, in the order of the labels.

Errors: `ValueError` for a side that it does not allow. It leaves its argument as it is.
"""


def apply(function: TransformationFunction, images: Tensor, *, name: str) -> Sequence[Tensor]:
    """What a function, which may be anyone's, makes of images, once it is what it should be.

    Errors: `DataError` of one line with the transformation's name, its file and line: for whatever the function raises,
    for results of another form, shape, type or device than the images, and for images that it has changed.
    """
    path, first_line = _defined_in(function)
    version = None if images.is_inference() else images._version
    try:
        results = function(images)
    except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    # Also SystemExit, which would end the run as if all were done.
    except BaseException as error:
        if isinstance(error, ValueError) and ".py:" not in name:
            raise DataError(f"transformation {name!r}: {error}") from None
        raise DataError(f"transformation {name!r}: {error_in(path, error)}") from error
    fault = _fault(results, images)
    if fault is None and version is not None and images._version != version:
        fault = "changes the images that it is given; it has to leave them and return others"
    if fault is not None:
        raise DataError(f"transformation {name!r}: {fault} ({path}, line {first_line})")
    return results


def error_in(path: str, error: BaseException) -> str:
    """What an error says and the line of a file that it comes from, as `ValueError: … (mine.py, line 3)`."""
    frames = traceback.extract_tb(error.__traceback__)
    line = ([frame.lineno for frame in frames if frame.filename == path] or [frames[-1].lineno])[-1]
    text = str(error)
    if isinstance(error, SyntaxError):
        line, text = error.lineno, error.msg
    return f"{type(error).__name__}: {' '.join(text.split())} ({path}, line {line})"


def _defined_in(function: TransformationFunction) -> tuple[str, int]:
    """The file of a function and the line where it begins."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return ("an object of no file", 0) if code is None else (code.co_filename, code.co_firstlineno)


def _fault(results: object, images: Tensor) -> str | None:
    """What is wrong with the results of a function."""
    if not isinstance(results, (list, tuple, Tensor)):
        return f"returns a {type(results).__name__}, not a list of tensors"
    for result in results:
        if not isinstance(result, Tensor):
            return f"returns a {type(result).__name__} among its copies, not a tensor"
        if result.shape != images.shape:
            return f"makes {tuple(result.shape)} of images of shape {tuple(images.shape)}"
        if (result.dtype, result.device) != (images.dtype, images.device):
            return f"makes {result.dtype} on {result.device} of images of {images.dtype} on {images.device}"
    return None


@dataclass(frozen=True, kw_only=True)
class Transformation:
    """The elements to use of a transformation function."""

    name: str
    function: TransformationFunction
    elements: tuple[int, ...]
    """Numbers of the function's results to use; the position in this tuple is the label."""
    num_results: int = 0
    """Of the function, whichever are used: as many at each call; 0 where that is not known."""
    one_copy: bool = False
    """Equivariance: whether a step makes one copy of each sample, by an element drawn for it, instead of all |G|."""

    @property
    def num_elements(self) -> int:
        """|G|."""
        return len(self.elements)

    def copies(self, images: Tensor) -> Tensor:
        """(N, C, S, S) → (|G|·N, C, S, S): all samples by the first element, then by the second, …

        Errors: as `apply`; `DataError` where the function makes another number of copies than when it was built.
        """
        results = apply(self.function, images, name=self.name)
        if self.num_results not in (0, len(results)):
            path, line = _defined_in(self.function)
            raise DataError(
                f"transformation {self.name!r}: makes {len(results)} copies, and made {self.num_results} before "
                f"({path}, line {line})"
            )
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
    try:
        copies = transformation.copies(images).view(transformation.num_elements, 3, num_pixels)
    except DataError:  # of a function that is only for images in float32, or for more than one
        return None
    table = (copies[:, 0] * num_pixels).round().long()
    if not ((table >= 0) & (table < num_pixels)).all():
        return None
    expected = images.view(3, num_pixels)[:, table].transpose(0, 1)
    return table if torch.equal(copies, expected) else None
