"""The device loader: all images of a `.beton` file in the training device's memory, crops cut there.

        .beton ──once, at the opening──▶ (num_samples, H, W, 3) uint8 on the device ──▶ crop 1, crop 2, … ──▶ Crops

For small images of like size, CIFAR's: nothing is decoded, and no pixel travels, during an epoch. Sample order and
boxes are drawn as everywhere (`loaders.parameters`), so the crops are the other loaders', up to a level of rounding
(FFCV's; from Pillow's bicubic crops both differ on hard edges, see `loaders.cut`).

Crop and resize are two matrix products a sample, (S, H) weights of the rows and (S, W) of the columns, with Pillow's
weights, zero outside of the box. For 32² pixels that is less work than to gather the pixels that have a weight.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.batch import Crops, uploaded
from loaders.errors import DataError
from loaders.images import BetonImages, open_beton
from loaders.machine import free_memory_bytes
from loaders.manifest import Manifest
from loaders.plan import EpochPlan
from loaders.recipe import Interpolation, Recipe


class DeviceLoader:
    """Keep all images on a device and cut all crops there."""

    def __init__(
        self,
        path: Path | str,
        recipes: tuple[Recipe, ...],
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        **plan: Any,
    ) -> None:
        """Read all images of a `.beton` file onto the device, each in the room of the largest height and width.

        Args: `num_workers` is the other loaders' and changes nothing here; `plan` the other fields of `EpochPlan`:
        `batch_size`, `seed`, `shuffle`, `drop_last`, `rank`, `num_ranks`, `subset`.
        Errors: `DataError` when the file does not match its manifest, an image does not decode, or they do not
        fit into the memory that is left; `ValueError` for a batch that cannot be formed.
        """
        del num_workers
        self.images = open_beton(Path(path))
        self.plan = EpochPlan(
            recipes=tuple(recipes),
            heights=self.images.heights,
            widths=self.images.widths,
            labels=self.images.labels,
            **plan,
        )
        self.images.begin_epoch()
        self._pixels: Tensor | None = _read_all(self.images, torch.device(device))

    @property
    def manifest(self) -> Manifest:
        return self.images.manifest

    @property
    def num_samples(self) -> int:
        return self.plan.num_samples

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return self.plan.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Crops, None, None]:
        """The epoch's batches from `start_step` on, cut on the device's current stream when they are asked for.

        Errors: `DataError` when the file was changed since it was opened; `ValueError` when the loader is closed.
        """
        self.images.begin_epoch()
        for batch in self.plan.batches(epoch, start_step):
            self.images.check()
            if self._pixels is None:
                raise ValueError("the loader is closed")
            crops = self.plan.crops(epoch, batch, ())
            pixels = self._pixels[uploaded(crops.indices, self._pixels.device)]
            boxes = uploaded(torch.from_numpy(crops.parameters.box), self._pixels.device)
            images = tuple(
                resized_crops(pixels, boxes[:, view], recipe.size, recipe.interpolation)
                for view, recipe in enumerate(self.plan.recipes)
            )
            yield Crops(
                images=images, labels=crops.labels, indices=crops.indices, parameters=crops.parameters
            )

    def close(self) -> None:
        """Let go of the images; once more is fine."""
        self._pixels = None
        self.images.close()


def resized_crops(images: Tensor, boxes: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Cut a box out of each image and resize it, antialiased as Pillow's `image.crop(box).resize(size, filter)`.

    Args: `images` (N, H, W, 3) uint8; `boxes` (N, 4) integers (top, left, height, width), on the same device.
    Returns: (N, size, size, 3) uint8, contiguous. Sums are float32 and rounded once; Pillow rounds and
    clamps between its passes.
    """
    num_images, height, width, _ = images.shape
    top, left, box_height, box_width = boxes.float().unbind(dim=1)
    row_weights = resize_weights(top, box_height, height, size, interpolation)
    column_weights = resize_weights(left, box_width, width, size, interpolation)
    rows = row_weights @ images.float().view(num_images, height, width * 3)  # (N, size, W · 3)
    columns = rows.view(num_images, size, width, 3).transpose(1, 2).reshape(num_images, width, size * 3)
    crops = (column_weights @ columns).view(num_images, size, size, 3).transpose(1, 2)
    return (crops + 0.5).clamp(0, 255).to(torch.uint8).contiguous()


def resize_weights(
    start: Tensor, length: Tensor, num_pixels: int, size: int, interpolation: Interpolation
) -> Tensor:
    """How much each pixel of an axis adds to each of the `size` pixels that the interval from `start` is resized to.

    Args: `start`, `length` (N,) float, pixels of the axis, whose length is `num_pixels`.
    Returns: (N, size, num_pixels), each row adding up to 1; a triangle of radius 1 or Keys' cubic (a = -0.5) of radius
    2, widened by the scale where that shrinks, as in Pillow's `precompute_coeffs`.
    """
    radius = 2 if interpolation == "bicubic" else 1
    scale = (length / size).view(-1, 1, 1)
    widening = scale.clamp_min(1)
    center = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(num_pixels, device=start.device) - start.view(-1, 1, 1)
    first = (center - radius * widening + 0.5).floor().clamp_min(0)
    end = (center + radius * widening + 0.5).floor().minimum(length.view(-1, 1, 1))
    x = ((pixel - center + 0.5) / widening).abs()
    if interpolation == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp_min(0)
    weights = weights * ((pixel >= first) & (pixel < end))
    return weights / weights.sum(dim=2, keepdim=True)


def _read_all(images: BetonImages, device: torch.device) -> Tensor:
    """(num_samples, H, W, 3) uint8 of the largest height and width; smaller images stand in the corner, over zeros."""
    shape = (len(images.labels), int(images.heights.max()), int(images.widths.max()), 3)
    num_bytes, room = math.prod(shape), _free_bytes(device)
    if num_bytes > room:
        raise DataError(
            f"{images.path}: {shape[0]} images of {shape[1]} × {shape[2]} pixels take {num_bytes / 2**30:.1f} GiB, and "
            f"{device} has {room / 2**30:.1f} GiB left; choose the loader 'ffcv'"
        )
    pixels = np.zeros(shape, np.uint8)
    for index, (height, width) in enumerate(zip(images.heights, images.widths, strict=True)):
        pixels[index, :height, :width] = np.asarray(images.image(index))
    return torch.from_numpy(pixels).to(device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # torch's, to be used again
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_memory_bytes()
