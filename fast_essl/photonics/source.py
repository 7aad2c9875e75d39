"""Cells as the training loop's data: batches of cells with their random words, and the views made from both.

All that is done to a cell moves its pixels about, so a view is one look-up: which pixel of the cell each of its pixels
is. The words come from (seed, epoch, cell, view), as everything random.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from fast_essl.config import ConfigError, TransformationConfig
from fast_essl.photonics.cells import MAX_PERMITTIVITY, SIDE
from fast_essl.photonics.config import AugmentationConfig, PhotonicsConfig
from fast_essl.photonics.store import CellFile
from fast_essl.source import Source
from fast_essl.transformations import build_transformation
from loaders.batch import Views
from loaders.order import epoch_order
from loaders.parameters import philox
from loaders.transformation import Transformation, source_pixels

NUM_VIEWS = 2
FINETUNE_VIEW = 2
"""The view number of fine-tuning's words, after pretraining's two."""


@dataclass(frozen=True, kw_only=True)
class CellBatch:
    """One batch as `CellLoader` gives it; its fields are named as those of `Crops`."""

    images: tuple[Tensor, ...]
    """The cells, (N, 32, 32) float32 relative permittivities."""
    labels: Tensor
    """(N,) int64, all 0: cells have no classes."""
    indices: Tensor
    """(N,) int64 numbers of the cells."""
    words: np.ndarray
    """(N, V, 4) uint32 random words, see `augmented`."""


class CellLoader:
    """The cells in the order of each epoch, in batches; the last, smaller one is left out."""

    def __init__(self, permittivity: np.ndarray, *, batch_size: int, seed: int) -> None:
        """Args: `permittivity` (N, 32, 32). Errors: `ConfigError` where there is less than one batch."""
        if len(permittivity) < batch_size:
            raise ConfigError(
                f"train.batch_size = {batch_size}: must be at most the {len(permittivity)} cells to pretrain on"
            )
        self._cells = torch.from_numpy(permittivity)
        self._batch_size, self._seed = batch_size, seed

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self._cells) // self._batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[CellBatch]:
        """The batches of an epoch from `start_step` on."""
        order = epoch_order(len(self._cells), seed=self._seed, epoch=epoch)
        for step in range(start_step, len(self)):
            indices = order[step * self._batch_size : (step + 1) * self._batch_size]
            chosen = torch.from_numpy(indices)
            yield CellBatch(
                images=(self._cells[chosen],),
                labels=torch.zeros_like(chosen),
                indices=chosen,
                words=draw_words(self._seed, epoch, indices, range(NUM_VIEWS)),
            )


def cell_source(config: PhotonicsConfig, file: CellFile, dtype: torch.dtype) -> Source:
    """The unlabelled cells, for `fast_essl.pretrain.train`.

    Errors: `ConfigError` for a transformation that is none of cells, and where the cells are fewer than a batch.
    """
    equivariance, invariance = cell_transformations(config.transformation, config.method.equivariance_weight)
    augmentation = config.augmentation

    def make_views(batch: CellBatch) -> Views:
        cells = batch.images[0]
        views = [
            as_images(augmented(cells, batch.words[:, view], augmentation, invariance)).to(dtype)
            for view in range(NUM_VIEWS)
        ]
        transformed = labels = None
        if equivariance is not None:
            transformed = equivariance.copies(as_images(cells)).to(dtype)
            labels = equivariance.labels(len(cells), cells.device)
        return Views(
            views=tuple(views),
            transformed=transformed,
            transformed_labels=labels,
            labels=batch.labels,
            indices=batch.indices,
        )

    return Source(
        loader=CellLoader(
            file.splits["pretrain"].permittivity, batch_size=config.train.batch_size, seed=config.train.seed
        ),
        make_views=make_views,
        evaluate=lambda backbone: {},
        digest=file.digest,
        num_classes=1,
    )


def cell_transformations(
    config: TransformationConfig, equivariance_weight: float
) -> tuple[Transformation | None, Transformation | None]:
    """What a run is equivariant and what, beside its augmentations, invariant to; None for nothing.

    Errors: `ConfigError` naming the field: unknown, or more than a way to move pixels about, which changes the crystal.
    """
    chosen = {
        "equivariance": (
            config.equivariance if equivariance_weight > 0 else "none",
            config.equivariance_elements,
        ),
        "invariance": (config.invariance, config.invariance_elements),
    }
    built: list[Transformation | None] = []
    for field, (name, elements) in chosen.items():
        if name == "none":
            built.append(None)
            continue
        try:
            transformation = build_transformation(name, elements, size=SIDE)
            if source_pixels(transformation, SIDE) is None:
                raise ConfigError(
                    f"transformation {name!r}: changes permittivities; choose one that moves pixels about"
                )
        except ConfigError as error:
            raise ConfigError(f"transformation.{field}: {error}") from None
        built.append(transformation)
    return built[0], built[1]


def as_images(cells: Tensor) -> Tensor:
    """(N, 32, 32) permittivities in [1, 20] → (N, 1, 32, 32) levels in [0, 1]."""
    return ((cells - 1) / (MAX_PERMITTIVITY - 1))[:, None]


def augmented(
    cells: Tensor,
    words: np.ndarray,
    augmentation: AugmentationConfig,
    invariance: Transformation | None = None,
) -> Tensor:
    """Each cell flipped, turned, then moved, and then transformed, by its own words.

    Args: `cells` (N, 32, 32); `words` (N, 4) uint32, for flip, turn, translation and transformation.
    Returns: (N, 32, 32).
    """
    device, num = cells.device, SIDE * SIDE
    pixels = torch.arange(num, device=device)
    # One row a kind of move: the pixel that each pixel comes from.
    image = pixels.view(1, SIDE, SIDE)
    flips = torch.cat([image, image.flip(1), image.flip(2)]).view(3, num)
    turns = torch.cat([torch.rot90(image, turn, (1, 2)) for turn in range(4)]).reshape(4, num)
    source = pixels.expand(len(cells), num)
    if augmentation.flips:
        source = source.gather(1, flips[_drawn(words[:, 0], 3, device)])
    if augmentation.rotations:
        source = source.gather(1, turns[_drawn(words[:, 1], 4, device)])
    if augmentation.translations:
        shift = _drawn(words[:, 2], num, device)[:, None]
        rows = (pixels // SIDE - shift // SIDE).remainder(SIDE)
        source = source.gather(1, rows * SIDE + (pixels - shift).remainder(SIDE))
    if invariance is not None:
        table = source_pixels(invariance, SIDE)
        assert table is not None  # cell_transformations has seen to it
        source = source.gather(1, table.to(device)[invariance.drawn_labels(words[:, 3]).to(device)])
    return cells.flatten(1).gather(1, source).view_as(cells)


def _drawn(words: np.ndarray, num: int, device: torch.device) -> Tensor:
    """Uniform (N,) uint32 words → (N,) int64 numbers below `num`, as good as uniform."""
    return torch.from_numpy((words.astype(np.int64) * num) >> 32).to(device)


def draw_words(seed: int, epoch: int, indices: np.ndarray, views: range) -> np.ndarray:
    """(N, V, 4) uint32 uniform words, a pure function of (seed, epoch, index, view) each."""
    return _draw(
        np.uint64(seed % 2**64), np.uint32(epoch), np.asarray(indices, np.uint32), np.array(views, np.uint32)
    )


@numba.njit(cache=True, nogil=True)
def _draw(seed, epoch, indices, views):  # type: ignore[no-untyped-def]
    words = np.empty((len(indices), len(views), 4), np.uint32)
    for n in range(len(indices)):
        for v in range(len(views)):
            words[n, v] = philox(seed, indices[n], epoch, views[v], np.uint32(0))
    return words
