"""The FFCV loader: `.beton` → `Crops`, one JPEG decode a sample.

        memory map ──▶ JPEG bytes ──▶ scratch RGB (one image a thread) ──▶ crop 1, crop 2, … ──▶ Crops
                       └──────── one decoder, compiled, GIL-free, a sample a thread ────────┘

FFCV runs the decoder in its own thread, some batches ahead, and owns the memory that it writes into. Its traversal
orders and random operators are not used: each row of the order that is handed to it holds a sample's index and its
crop boxes, drawn before (`loaders.parameters`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import typed

from loaders.batch import Crops
from loaders.beton import IMAGE_JPEG
from loaders.cut import cut_sample
from loaders.errors import DataError
from loaders.images import open_beton, undecodable
from loaders.machine import num_cores
from loaders.manifest import Manifest
from loaders.plan import EpochPlan
from loaders.recipe import Recipe


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """FFCV sets numba's and torch's threads for whoever calls it; the trainer's are not its business."""
    numba_threads, torch_threads = numba.get_num_threads(), torch.get_num_threads()
    try:
        yield
    finally:
        numba.set_num_threads(numba_threads)
        torch.set_num_threads(torch_threads)


@contextmanager
def _plain_dict() -> Iterator[None]:
    """FFCV, when imported, writes two words into a `numba.typed.Dict`, for which numba compiles 3 s of CPU time.

    Only Python reads them, so a plain dict serves as well.
    """
    typed_dict = typed.Dict
    typed.Dict = dict
    try:
        yield
    finally:
        typed.Dict = typed_dict


with _thread_counts_kept(), _plain_dict():  # importing it alone leaves both counts at 1
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State

NUM_BATCHES_AHEAD = 2
"""Batches FFCV prepares in advance; memory is this plus two batches of crops."""


class FFCVLoader:
    """Decode once and cut all crops, in FFCV's threads.

    One loader serves all epochs: making one costs some seconds of compilation.
    """

    def __init__(
        self,
        path: Path | str,
        recipes: tuple[Recipe, ...],
        *,
        num_workers: int = 0,
        **plan: Any,
    ) -> None:
        """Open a `.beton` file and compile the decoder.

        Args: `num_workers` threads, 0 for one a core; `plan` the other fields of `EpochPlan`: `batch_size`, `seed`,
        `shuffle`, `drop_last`, `rank`, `num_ranks`, `subset`.
        Errors: `DataError` when the file does not match its manifest, `ValueError` for a batch that cannot be formed
        or more threads than numba was started with.
        """
        self.images = open_beton(Path(path))
        num_workers = num_workers or num_cores()
        if num_workers > numba.config.NUMBA_NUM_THREADS:
            raise ValueError(
                f"num_workers = {num_workers}: numba was started with {numba.config.NUMBA_NUM_THREADS} threads; "
                f"set NUMBA_NUM_THREADS={num_workers} to have more than one a core"
            )
        self.plan = EpochPlan(
            recipes=tuple(recipes),
            heights=self.images.heights,
            widths=self.images.widths,
            labels=self.images.labels,
            **plan,
        )
        with _thread_counts_kept():
            self._loader = Loader(
                str(path),
                batch_size=self.plan.batch_size // self.plan.num_ranks,
                num_workers=num_workers,
                os_cache=True,
                drop_last=False,
                batches_ahead=NUM_BATCHES_AHEAD,
                pipelines={"image": [_CropsDecoder(self.plan.recipes)], "label": None},
            )
        # Half a kilobyte a sample that only FFCV's other cache reads.
        manager = self._loader.memory_manager
        for table in (manager.ptr_to_size, manager.sample_to_pages, manager.page_to_samples):
            table.clear()

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
        """The epoch's batches from `start_step` on; FFCV's thread and memory are freed with the generator.

        Errors: `DataError` naming the file and the sample that does not decode.
        """
        batches = self.plan.batches(epoch, start_step)
        if not batches:
            return
        indices = np.concatenate(batches)
        boxes = self.plan.parameters(epoch, indices).box.reshape(len(indices), -1)
        steps = _Epoch(self._loader, np.column_stack([indices, boxes]))
        try:
            for batch in batches:
                rows, status = steps.next_batch()
                if status.any():
                    raise undecodable(self.images.path, int(batch[np.flatnonzero(status)[0]]))
                yield self.plan.crops(epoch, batch, self._split(rows))
        finally:
            steps.stop()

    def _split(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """One tensor a crop; copies, since FFCV writes into the same memory again some batches later."""
        images, offset = [], 0
        for recipe in self.plan.recipes:
            num_bytes = 3 * recipe.size**2
            crop = rows[:, offset : offset + num_bytes].reshape(-1, recipe.size, recipe.size, 3)
            images.append(torch.from_numpy(np.ascontiguousarray(crop)))
            offset += num_bytes
        return tuple(images)

    def close(self) -> None:
        """Let go of FFCV's loader and of its memory map."""
        del self._loader


class _CropsDecoder(SimpleRGBImageDecoder):
    """Decode a sample into scratch memory and cut every crop from it.

    Each row of FFCV's `batch_indices` is (sample index, top, left, height, width of crop 1, of crop 2, …).
    The output is the crops of each sample, one after the other, (N, num_bytes) uint8, and the decoder's status,
    (N,) int32, 0 where all went well.
    """

    def __init__(self, recipes: tuple[Recipe, ...]) -> None:
        super().__init__()
        self.sizes = np.array([recipe.size for recipe in recipes])
        self.cubic = np.array([recipe.interpolation == "bicubic" for recipe in recipes], dtype=np.uint8)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        crops = AllocationQuery((int((3 * self.sizes**2).sum()),), np.dtype("u1"))
        status = AllocationQuery((), np.dtype("i4"))
        return replace(previous_state, jit_mode=True), (crops, status)

    def generate_code(self) -> Callable[..., Any]:
        read, parallel_range = self.memory_read, Compiler.get_iterator()
        sizes, cubic, num_crops = self.sizes, self.cubic, len(self.sizes)
        # Called by address, so that FFCV, which caches nothing, compiles a loop and not all that the loop calls.
        cut = cut_sample.ctypes

        def decode(rows, memory, metadata, storage):  # type: ignore[no-untyped-def]
            # Unpacked as `crops, status = memory`, the parallel loop's writes are lost (numba 0.68.1).
            crops, status = memory[0], memory[1]
            for n in parallel_range(len(rows)):
                field = metadata[rows[n, 0]]
                data = read(field["data_ptr"], storage)
                status[n] = cut(
                    data.ctypes.data,
                    data.size,
                    field["mode"] == IMAGE_JPEG,
                    field["height"],
                    field["width"],
                    rows[n, 1:].ctypes.data,
                    sizes.ctypes.data,
                    cubic.ctypes.data,
                    num_crops,
                    crops[n].ctypes.data,
                )
            return memory

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class _Epoch(EpochIterator):
    """FFCV's epoch thread, with errors that reach the consumer and an end that frees thread and memory."""

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # else the thread would end unseen, and the consumer wait for ever
            self.error = error
            self.output_queue.put(None)

    def next_batch(self) -> tuple[np.ndarray, ...]:
        try:
            (batch,) = next(self)
        except StopIteration:
            raise DataError(
                f"{self.loader.fname}: FFCV's thread ended early ({self.error!r})"
            ) from self.error
        return batch

    def stop(self) -> None:
        self.iter_ixes = iter(())
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.01)
            except queue.Empty:
                continue
        self.close()
        self.closed = True
