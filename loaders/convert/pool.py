"""Encoding in several processes, in the order of the source, holding a bounded number of images."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, TypeVar

from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.machine import num_cores
from loaders.waiting import MAX_WAIT_VARIABLE, max_wait_s

Result = TypeVar("Result")
_CHUNK_SAMPLES: Final = 64
_CHUNK_BYTES: Final = 1 << 20
_CHUNKS_AHEAD: Final = 2
"""Chunks in flight for each worker: one at work and one waiting."""


def map_samples(
    work: Callable[[Sample], Result], samples: Iterable[Sample], *, num_workers: int
) -> Generator[tuple[Sample, Result]]:
    """`work(sample)` for each sample, in order, with the sample.

    Args:
        work: a function that worker processes can import.
        samples: read as far ahead as the workers need, no further.
        num_workers: 0 = all cores; 1 = in this process.

    Errors: what `work` raises; DataError if a worker process dies or stands still. None leaves a process waiting.
    """
    num_workers = num_workers or num_cores()
    if num_workers == 1:
        for sample in samples:
            yield sample, work(sample)
        return
    # A fork of this process could inherit a lock that another thread holds, and hang; the fork server has no
    # threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loaders.convert.encode"])
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    processes = [_start_worker(context, idle) for _ in range(num_workers)]
    threads = ThreadPoolExecutor(num_workers)
    waiting: deque[tuple[list[Sample], Future[list[Result]]]] = deque()
    try:
        for chunk in _chunks(samples):
            waiting.append((chunk, threads.submit(_ask, idle, work, chunk)))
            if len(waiting) == num_workers * _CHUNKS_AHEAD:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())
    except _WorkerDied as error:
        raise DataError(
            "a worker process died (killed, out of memory, or a decoder that crashed): try fewer --workers; "
            "--workers 1 shows where it happens"
        ) from error
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


class _WorkerDied(Exception):
    pass


def _start_worker(context: Any, idle: queue.SimpleQueue[Connection]) -> Any:
    # A pipe for each worker, whose far end it alone holds: should it die, even in the middle of a message, the near
    # end reads an end of file. (The pool of concurrent.futures shares one pipe and then waits for ever.)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    idle.put(ours)
    return process


def _ask(
    idle: queue.SimpleQueue[Connection], work: Callable[[Sample], Result], chunk: list[Sample]
) -> list[Result]:
    connection = idle.get()
    try:
        connection.send((work, chunk))
        results, error = connection.recv()
    except (EOFError, OSError) as error:
        raise _WorkerDied from error
    finally:
        idle.put(connection)
    if error is not None:
        raise error
    return results


def _serve(connection: Connection) -> None:
    # Ctrl-C goes to all processes of the terminal, SIGTERM often to the whole group; the first process alone decides
    # what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            work, chunk = connection.recv()
        except EOFError:
            return
        answer: tuple[list[Any] | None, Exception | None]
        try:
            answer = list(map(work, chunk)), None
        except Exception as error:  # raised again by the process that asked
            answer = None, error
        connection.send(answer)


def _finished(chunk: list[Sample], future: Future[list[Result]]) -> Iterator[tuple[Sample, Result]]:
    # The oldest chunk is always at work: it never waits for another one.
    if not wait([future], timeout=max_wait_s()).done:
        raise DataError(
            f"{chunk[0].name}: a worker process gave nothing for {max_wait_s()} s while it encoded this and the "
            f"{len(chunk) - 1} images behind it; see whether the disk answers, or set {MAX_WAIT_VARIABLE} higher"
        )
    return zip(chunk, future.result(), strict=True)


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples in lists of at most 64 or about 1 MiB, so that small images share the cost of a message."""
    chunk: list[Sample] = []
    num_bytes = 0
    for sample in samples:
        chunk.append(sample)
        num_bytes += _num_bytes(sample)
        if len(chunk) == _CHUNK_SAMPLES or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _num_bytes(sample: Sample) -> int:
    if isinstance(sample.image, Path):
        return os.stat(sample.image).st_size if os.path.exists(sample.image) else 0
    return len(sample.image) if isinstance(sample.image, bytes) else sample.image.nbytes
