"""The reference loader: the same `Crops` through a PyTorch DataLoader and Pillow.

Slow and obvious; the other loaders are tested against it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loaders.batch import Crops
from loaders.errors import DataError
from loaders.images import BetonImages, FolderImages, open_beton, open_folder
from loaders.machine import num_cores
from loaders.manifest import Manifest
from loaders.plan import EpochPlan
from loaders.recipe import Recipe
from loaders.waiting import MAX_WAIT_VARIABLE, max_wait_s

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class TorchLoader:
    """Decode and cut in DataLoader worker processes, from a `.beton` file or an image folder."""

    def __init__(
        self,
        path: Path | str,
        recipes: tuple[Recipe, ...],
        *,
        num_workers: int = 0,
        **plan: Any,
    ) -> None:
        """Open the data.

        Args: `path` a `.beton` file or an image folder; `num_workers` processes, 0 for one a core; `plan` the other
        fields of `EpochPlan`: `batch_size`, `seed`, `shuffle`, `drop_last`, `rank`, `num_ranks`, `subset`.
        Errors: `DataError` for data that cannot be opened, `ValueError` for a batch that cannot be formed.
        """
        path = Path(path)
        self.images: BetonImages | FolderImages = open_folder(path) if path.is_dir() else open_beton(path)
        self._is_closed = False
        self.num_workers = num_workers or num_cores()
        self.plan = EpochPlan(
            recipes=tuple(recipes),
            heights=self.images.heights,
            widths=self.images.widths,
            labels=self.images.labels,
            **plan,
        )

    @property
    def manifest(self) -> Manifest:
        """Errors: `DataError` for an image folder, which has none."""
        if isinstance(self.images, FolderImages):
            raise DataError(
                f"{self.images.path}: an image folder has no manifest; convert it to a .beton file"
            )
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
        """The epoch's batches from `start_step` on; the worker processes end with the generator.

        Errors: `DataError` naming the file that was changed since it was opened, the sample that is damaged or does
        not decode, or a worker process that died or stands still; `ValueError` when the loader is closed.
        """
        self._check(begin=True)
        batches = self.plan.batches(epoch, start_step)
        dataset = _Batches(self.images, self.plan, epoch, batches)
        # A data set item is a whole batch, so that collation stays with us; no `fork` handler of numba's is needed.
        steps = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=2,
            multiprocessing_context="fork",
            worker_init_fn=_leave_process_group,
        )
        batches_of_images = iter(steps)
        for indices in batches:
            images = _next(batches_of_images)
            if isinstance(images, DataError):
                raise images
            self._check()
            yield self.plan.crops(epoch, indices, tuple(images))

    def _check(self, begin: bool = False) -> None:
        if self._is_closed:
            raise ValueError("the loader is closed")
        if isinstance(self.images, BetonImages):
            if begin:
                self.images.begin_epoch()
            self.images.check()

    def close(self) -> None:
        """Close the file; once more is fine."""
        self._is_closed = True
        if isinstance(self.images, BetonImages):
            self.images.close()


def _next(batches: Any) -> list[torch.Tensor] | DataError:
    """The next batch of a DataLoader's iterator, whose worker processes are killed when none comes in time.

    Its own `timeout` does not cover a worker that stops while it hands over a batch, and its own signal at the end
    would not reach a stopped one.
    """
    limit_s, is_late = max_wait_s(), threading.Event()

    def give_up() -> None:
        is_late.set()
        # Else torch would raise an error for each of them wherever the program happens to be.
        torch._C._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
        for worker in batches._workers:
            worker.kill()

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        return next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        if is_late.is_set():
            what = f"gave nothing for {limit_s} s; see whether the disk answers, or set {MAX_WAIT_VARIABLE} higher"
        elif "DataLoader worker" in str(error):
            what = f"died ({' '.join(str(error).split())}); see whether memory is left"
        else:
            raise
        raise DataError(f"the torch loader: a worker process {what}") from error
    finally:
        timer.cancel()


def _leave_process_group(worker: int) -> None:
    """A signal to the trainer's group, as torchrun sends it, is the trainer's business: it ends its workers itself."""
    os.setpgid(0, 0)


class _Batches(Dataset[list[torch.Tensor] | DataError]):
    def __init__(
        self, images: BetonImages | FolderImages, plan: EpochPlan, epoch: int, batches: list[np.ndarray]
    ) -> None:
        self.images, self.plan, self.epoch, self.batches = images, plan, epoch, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[torch.Tensor] | DataError:
        indices = self.batches[step]
        boxes = self.plan.parameters(self.epoch, indices).box
        crops = [np.empty((len(indices), r.size, r.size, 3), np.uint8) for r in self.plan.recipes]
        for n, index in enumerate(indices):
            try:
                image = self.images.image(int(index))
            except DataError as error:
                # Sent as a value: the DataLoader would wrap an exception in the worker's whole traceback.
                return error
            for view, recipe in enumerate(self.plan.recipes):
                crops[view][n] = pillow_crop(image, boxes[n, view], recipe)
        return [torch.from_numpy(crop) for crop in crops]


def pillow_crop(image: Image.Image, box: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Cut (top, left, height, width) out of an RGB image and resize it: (size, size, 3) uint8."""
    top, left, height, width = (int(edge) for edge in box)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((recipe.size, recipe.size), _FILTERS[recipe.interpolation]))
