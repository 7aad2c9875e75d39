"""The DALI loader: a `.beton` file or an image folder → `Crops`, one decode a sample.

        open file ──▶ JPEG bytes, checksum ──▶ decoder ──▶ RGB batch ──┬▶ slice ──▶ resize ──▶ crop 1
                                               nvJPEG on the GPU, or   └▶ slice ──▶ resize ──▶ crop 2, …
                                               libjpeg-turbo on the CPU

DALI runs the graph in threads of its own, some batches ahead. Its readers and random operators are not used: sample
order and crop boxes are drawn before (`loaders.parameters`) and handed in with the bytes.

How near it is to the other loaders: the CPU decoder gives Pillow's pixels bit for bit (grey, CMYK and YCCK JPEGs and
palettes too). Inside a crop the resize is FFCV's to one
level. At its border DALI repeats pixels where a widened filter stands over the edge, and the others leave that part
away: up to some 30 levels there, on photographs a mean of 0.03 a crop, and of 0.2 against Pillow, which also rounds
between its passes, and on hard edges clamps what bicubic overshoots (up to 29 levels, see `loaders.cut`). `fn.slice`
stands before the resize, since a resize of a region would read pixels outside the box.

Damage that DALI does not notice: wrong bytes behind a JPEG's header, or an end marker too early, give wrong or grey
pixels without an error. So each sample of a `.beton` file is compared with its checksum before DALI sees it, and damage
is named as by the other loaders. That leaves two kinds of data without a checksum: the files of an image folder, and
`.beton` files of 0.1.0, whose blocks are checked once in the background. Bytes that are no image, that run out, or
whose size is not the one in the tables are named in any case.

In an image folder only plain files go to DALI as they are: upright JPEGs, and upright PNGs of 8 bits without
transparency. All others, as those that EXIF data turns, are decoded by Pillow, so that they are what conversion would
store; many of them make the folder slow to read, and conversion is the remedy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from loaders.batch import Crops
from loaders.beton import IMAGE_RAW
from loaders.errors import DataError
from loaders.images import BetonImages, FolderImages, open_beton, open_folder, undecodable
from loaders.machine import num_cores
from loaders.manifest import Manifest
from loaders.plan import EpochPlan
from loaders.recipe import Recipe

NUM_BATCHES_AHEAD = 2
"""Batches DALI prepares in advance; memory is this many batches of decoded images and crops."""

_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class DALILoader:
    """Decode once and cut all crops, in DALI's threads, on the CPU or on the GPU.

    One loader serves all epochs with one pipeline; an epoch that is left early takes the pipeline with it.
    """

    def __init__(
        self,
        path: Path | str,
        recipes: tuple[Recipe, ...],
        *,
        num_workers: int = 0,
        decoder: Literal["auto", "cpu", "mixed"] = "auto",
        **plan: Any,
    ) -> None:
        """Open the data; the pipeline is built by the first epoch.

        Args: `path` a `.beton` file or an image folder; `num_workers` threads, 0 for one a core; `decoder` `mixed`
        (nvJPEG, crops on the current CUDA device), `cpu` (libjpeg-turbo, crops in memory, needs no driver) or `auto`,
        `mixed` where there is a CUDA device; `plan` the other fields of `EpochPlan`: `batch_size`, `seed`, `shuffle`,
        `drop_last`, `rank`, `num_ranks`, `subset`.
        Errors: `DataError` for data that cannot be opened and for `mixed` without a CUDA device, `ValueError` for a
        batch that cannot be formed.
        """
        path = Path(path)
        self.decoder = resolve_decoder(decoder)
        self.images: BetonImages | FolderImages = open_folder(path) if path.is_dir() else open_beton(path)
        self.num_workers = num_workers or num_cores()
        self.plan = EpochPlan(
            recipes=tuple(recipes),
            heights=self.images.heights,
            widths=self.images.widths,
            labels=self.images.labels,
            **plan,
        )
        self._is_raw = np.zeros(len(self.images.labels), bool)
        if isinstance(self.images, BetonImages):
            self._is_raw = self.images.tables.modes == IMAGE_RAW
        self._all_raw = bool(self._is_raw.all())
        self._cuda = torch.device("cuda", torch.cuda.current_device()) if self.decoder == "mixed" else None
        self._stream = torch.cuda.Stream(self._cuda) if self._cuda else None
        self._idle: tuple[Pipeline, _Feed] | None = None
        self._is_closed = False

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
        """The epoch's batches from `start_step` on; images on the CPU, or with the `mixed` decoder on its CUDA device.

        The images are the consumer's own: no later batch is written into their memory.
        Errors: `DataError` naming the file that was changed since it was opened, or the sample that is damaged or does
        not decode; `ValueError` when the loader is closed.
        """
        self._check(begin=True)
        batches = self.plan.batches(epoch, start_step)
        if not batches:
            return
        # Taken, not lent: what is left early or fails is dropped with its threads, and a second epoch at the same
        # time builds its own.
        taken, self._idle = self._idle or self._build(self.plan.batch_size // self.plan.num_ranks), None
        pipeline, feed = taken
        feed.start(self._inputs(epoch, batch) for batch in batches)
        pipeline.schedule_run()
        for batch in batches:
            self._check()
            try:
                *outputs, shapes = pipeline.share_outputs()
            except StopIteration:
                # Some batches ahead a sample could not be read; those before it have been handed out.
                raise feed.error or DataError(f"{self.images.path}: DALI ended early") from None
            except RuntimeError as error:
                raise self._failure(epoch, batch, error) from error
            self._check_sizes(batch, shapes)
            images = self._owned(outputs)
            pipeline.release_outputs()
            pipeline.schedule_run()
            yield self.plan.crops(epoch, batch, images)
        pipeline.reset()
        self._idle = taken

    def close(self) -> None:
        """Let go of the pipeline, with its threads and its memory, and of the file; once more is fine."""
        self._idle = None
        self._is_closed = True
        if isinstance(self.images, BetonImages):
            self.images.close()

    def _check(self, begin: bool = False) -> None:
        if self._is_closed:
            raise ValueError("the loader is closed")
        if isinstance(self.images, BetonImages):
            if begin:
                self.images.begin_epoch()
            self.images.check()

    def _build(self, batch_size: int) -> tuple[Pipeline, _Feed]:
        """The graph, and what it is fed with: the images, then the starts and the shapes of each crop."""
        recipes, feed = self.plan.recipes, _Feed()
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.num_workers,
            device_id=self._cuda.index
            if self._cuda
            else None,  # None: the CPU's operators alone, without a driver
            prefetch_queue_depth=NUM_BATCHES_AHEAD,
        )
        with pipeline:
            stored, *boxes = fn.external_source(
                feed,
                num_outputs=1 + 2 * len(recipes),
                no_copy=True,
                layout=["HWC" if self._all_raw else ""] + [""] * (2 * len(recipes)),
                dtype=[types.UINT8] + [types.INT32] * (2 * len(recipes)),
            )
            if self._all_raw:
                images = stored.gpu() if self._cuda else stored
            else:
                # Fancy upsampling is how libjpeg-turbo makes up the colours between, and nvJPEG only if asked.
                images = fn.decoders.image(
                    stored,
                    device=self.decoder,
                    output_type=types.RGB,
                    adjust_orientation=False,
                    jpeg_fancy_upsampling=True,
                )
            crops = [
                fn.resize(
                    fn.slice(images, start=start, shape=shape, axes=[0, 1]),
                    size=[recipe.size, recipe.size],
                    interp_type=_FILTERS[recipe.interpolation],
                    antialias=True,
                )
                for recipe, start, shape in zip(recipes, boxes[::2], boxes[1::2], strict=True)
            ]
            pipeline.set_outputs(*crops, images.shape())
        pipeline.build()
        return pipeline, feed

    def _inputs(self, epoch: int, batch: np.ndarray) -> tuple[Any, ...]:
        """One batch for the graph: a list of N arrays, then two (N, 2) int32 tables (y, x) a recipe."""
        box = self.plan.parameters(epoch, batch).box
        inputs: list[Any] = [[self._stored(int(index)) for index in batch]]
        for view in range(len(self.plan.recipes)):
            inputs += [np.ascontiguousarray(box[:, view, :2]), np.ascontiguousarray(box[:, view, 2:])]
        return tuple(inputs)

    def _stored(self, index: int) -> np.ndarray:
        """A sample as DALI takes it: the bytes of its file, and raw pixels as an image or, among JPEGs, as a PPM."""
        if isinstance(self.images, FolderImages):
            if not self.images.plain[index]:
                return _as_ppm(np.asarray(self.images.image(index)))
            try:
                return np.fromfile(self.images.files[index], np.uint8)
            except OSError as error:
                raise DataError(f"{self.images.files[index]}: cannot be read ({error.strerror})") from error
        data = np.frombuffer(self.images.stored(index), np.uint8)
        if not self._is_raw[index]:
            return data
        height, width = int(self.images.heights[index]), int(self.images.widths[index])
        if self._all_raw:
            return data.reshape(height, width, 3)
        return _as_ppm(data.reshape(height, width, 3))

    def _check_sizes(self, batch: np.ndarray, shapes: Any) -> None:
        """Boxes are drawn for the sizes in the tables: refuse an image that was replaced since it was opened."""
        expected = np.stack([self.images.heights[batch], self.images.widths[batch]], axis=1)
        wrong = (shapes.as_array()[:, :2] != expected).any(axis=1)
        if wrong.any():
            raise self._undecodable(int(batch[np.argmax(wrong)]))

    def _owned(self, outputs: list[Any]) -> tuple[torch.Tensor, ...]:
        """DALI's outputs as tensors that stay as they are.

        In memory each tensor holds DALI's buffer, which is not used again before the tensor is gone. On the GPU DALI
        knows nothing of the streams that still read when the tensor goes, torch's allocator does: hence a copy, on a
        stream that waits for no training step, of memory that is returned when the consumer's stream has come there.
        """
        if self._stream is None:
            return tuple(from_dlpack(output.as_tensor()) for output in outputs)
        with torch.cuda.stream(self._stream):
            images = tuple(from_dlpack(output.as_tensor()).clone() for output in outputs)
        self._stream.synchronize()
        for image in images:
            image.record_stream(torch.cuda.current_stream(self._cuda))
        return images

    def _failure(self, epoch: int, batch: np.ndarray, error: RuntimeError) -> DataError:
        """Which sample of a batch DALI stumbled over: it rarely tells, so each is tried alone."""
        pipeline, feed = self._build(1)
        for row in range(len(batch)):
            feed.start(iter([self._inputs(epoch, batch[row : row + 1])]))
            try:
                pipeline.schedule_run()
                pipeline.share_outputs()
            except RuntimeError:
                return self._undecodable(int(batch[row]))
            pipeline.release_outputs()
            pipeline.schedule_run()  # finds the end of the inputs
            pipeline.reset()
        return DataError(f"{self.images.path}: DALI failed ({' '.join(str(error).split())})")

    def _undecodable(self, index: int) -> DataError:
        if isinstance(self.images, FolderImages):
            return DataError(
                f"{self.images.files[index]}: does not decode as the image that it was when opened"
            )
        return undecodable(self.images.path, index)


def _as_ppm(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as the bytes of a file, for DALI to take among JPEGs."""
    height, width, _ = pixels.shape
    return np.concatenate([np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8), pixels.reshape(-1)])


class _Feed:
    """What DALI calls for the inputs of each batch; it holds the last ones, which DALI reads without a copy."""

    def __init__(self) -> None:
        self._inputs: Iterator[tuple[Any, ...]] = iter(())
        self._held: deque[tuple[Any, ...]] = deque(maxlen=NUM_BATCHES_AHEAD + 2)
        self.error: DataError | None = None

    def start(self, inputs: Iterator[tuple[Any, ...]]) -> None:
        """Begin to hand these out."""
        self._inputs, self.error = inputs, None

    def __call__(self) -> tuple[Any, ...]:
        try:
            self._held.append(next(self._inputs))  # the end, StopIteration, is the end of DALI's epoch
        except DataError as error:
            # DALI asks some batches ahead: those that are whole come out first.
            self.error = error
            raise StopIteration from None
        return self._held[-1]


def resolve_decoder(decoder: Literal["auto", "cpu", "mixed"]) -> Literal["cpu", "mixed"]:
    """What `auto` comes to on this machine. Errors: `DataError` for `mixed` without a CUDA device."""
    if decoder not in ("auto", "cpu", "mixed"):
        raise DataError(f"DALI decoder {decoder!r} is unknown; choose one of auto, cpu, mixed")
    if decoder == "cpu" or (decoder == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise DataError("DALI decoder 'mixed': there is no CUDA device here; use 'auto' or 'cpu'")
    return "mixed"
