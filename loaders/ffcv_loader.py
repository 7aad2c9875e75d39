"""The FFCV loader: `.beton` → `Crops`, one JPEG decode a sample.

        open file ──▶ JPEG bytes, checksum ──▶ scratch RGB (one image a thread) ──▶ crop 1, crop 2, … ──▶ Crops
                      └──────────── one loop, compiled, GIL-free, a sample a thread ────────────┘

FFCV runs the loop (`loaders.cut.cut_batch`) in its own thread, some batches ahead, and owns the memory that it writes
into. Its traversal orders, random operators and memory map are not used: each row of the order that is handed to it
holds a sample's index and its crop boxes, drawn before (`loaders.parameters`). FFCV compiles nothing either: the loop
is the same for every loader, and numba's cache keeps it.
"""

from __future__ import annotations

import queue
import weakref
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
from loaders.cut import DAMAGED, NOT_READ, cut_batch
from loaders.errors import DataError
from loaders.images import BetonImages, damaged, open_beton, undecodable
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
def _nothing_compiled() -> Iterator[None]:
    """FFCV would compile each function for each loader again, and never free it.

    For its own way of reading, which is not used here, it also marks array types as read-only that numba shares in the
    whole process (ffcv 1.0.2, `OSCacheManager.state_type`). That changes their hash, and numba's tables of compiled
    functions, which have them as keys, lead to errors and endless loops.
    """
    compile_reader = OSCacheManager.compile_reader
    OSCacheManager.compile_reader = lambda manager: None
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(True)
        OSCacheManager.compile_reader = compile_reader


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
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State

NUM_BATCHES_AHEAD = 2
"""Batches FFCV prepares in advance; memory is this plus two batches of crops."""


class FFCVLoader:
    """Decode once and cut all crops, in FFCV's threads. One loader serves all epochs."""

    def __init__(
        self,
        path: Path | str,
        recipes: tuple[Recipe, ...],
        *,
        num_workers: int = 0,
        **plan: Any,
    ) -> None:
        """Open a `.beton` file.

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
        with _thread_counts_kept(), _nothing_compiled():
            self._loader = Loader(
                # The file that was opened, whatever its name means by now.
                f"/proc/self/fd/{self.images.file.descriptor}",
                batch_size=self.plan.batch_size // self.plan.num_ranks,
                num_workers=num_workers,
                os_cache=True,
                drop_last=False,
                batches_ahead=NUM_BATCHES_AHEAD,
                pipelines={"image": [_CropsDecoder(self.images, self.plan.recipes)], "label": None},
            )
        manager = self._loader.memory_manager
        # Else FFCV would map the file into memory.
        manager.context.mmap = np.empty(0, np.uint8)
        # Half a kilobyte a sample that only FFCV's other cache reads.
        for table in (manager.ptr_to_size, manager.sample_to_pages, manager.page_to_samples):
            table.clear()
        self._running: weakref.WeakSet[_Epoch] = weakref.WeakSet()

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

        Errors: `DataError` naming the file that was changed since it was opened, or the sample that is damaged or does
        not decode; `ValueError` when the loader is closed.
        """
        self.images.begin_epoch()
        batches = self.plan.batches(epoch, start_step)
        if not batches:
            return
        indices = np.concatenate(batches)
        boxes = self.plan.parameters(epoch, indices).box.reshape(len(indices), -1)
        steps = _Epoch(self._loader, np.column_stack([indices, boxes]))
        self._running.add(steps)
        try:
            for batch in batches:
                self.images.check()
                rows, status = steps.next_batch()
                bad = np.flatnonzero(status)
                if bad.size:
                    raise self._failure(int(batch[bad[0]]), int(status[bad[0]]))
                yield self.plan.crops(epoch, batch, self._split(rows))
        finally:
            steps.stop()

    def _failure(self, index: int, status: int) -> DataError:
        if status == DAMAGED:
            return damaged(self.images.path, index)
        if status == NOT_READ:
            try:
                self.images.stored(index)  # says what is wrong with it
            except DataError as error:
                return DataError(f"sample {index} cannot be read: {error}")
            return DataError(f"{self.images.path}: sample {index} could not be read at first; check the disk")
        return undecodable(self.images.path, index)

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
        """End the epochs that are running, and close the file; once more is fine."""
        for steps in list(self._running):
            steps.stop()
        self.images.close()


class _CropsDecoder(SimpleRGBImageDecoder):
    """Read a sample, decode it into scratch memory and cut every crop from it.

    Each row of FFCV's `batch_indices` is (sample index, top, left, height, width of crop 1, of crop 2, …).
    The output is the crops of each sample, one after the other, (N, num_bytes) uint8, and the status of each, (N,)
    int32, as `cut_batch` has it. FFCV's own view of the file, its memory map, is not touched.
    """

    def __init__(self, images: BetonImages, recipes: tuple[Recipe, ...]) -> None:
        super().__init__()
        self.sizes = np.array([recipe.size for recipe in recipes])
        self.cubic = np.array([recipe.interpolation == "bicubic" for recipe in recipes], dtype=np.uint8)
        self.descriptor = images.file.descriptor
        tables = images.tables
        checksums = np.empty(0, np.uint64) if tables.checksums is None else tables.checksums
        self.tables = (
            tables.data_ptrs, tables.data_sizes, checksums, tables.modes, tables.heights, tables.widths,
        )  # fmt: skip

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        crops = AllocationQuery((int((3 * self.sizes**2).sum()),), np.dtype("u1"))
        status = AllocationQuery((), np.dtype("i4"))
        return replace(previous_state, jit_mode=True), (crops, status)

    def generate_code(self) -> Callable[..., Any]:
        def decode(rows: np.ndarray, memory: tuple[np.ndarray, ...], *_: Any) -> tuple[np.ndarray, ...]:
            crops, status = memory
            cut_batch(self.descriptor, rows, self.tables, self.sizes, self.cubic, crops, status)
            return memory

        return decode


class _Epoch(EpochIterator):
    """FFCV's epoch thread, with errors that reach the consumer and an end that frees thread and memory."""

    error: BaseException | None = None
    stopped = False

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
            if self.stopped:
                raise ValueError("the loader is closed") from None
            raise DataError(f"FFCV's thread ended early ({self.error!r})") from self.error
        return batch

    def stop(self) -> None:
        """End the thread; who waits for a batch, or asks for one later, hears of it."""
        if self.stopped:
            return
        self.iter_ixes = iter(())
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.01)
            except queue.Empty:
                continue
        self.close()
        self.closed = self.stopped = True
        while not self.output_queue.empty():
            self.output_queue.get()
        self.output_queue.put(None)
