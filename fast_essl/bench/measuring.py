"""Timing: warm-up apart, median and range over repeats, device events on a GPU, CPU time beside wall time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one room was measured to do."""

    name: str
    """The room, as the table and the chart call it."""
    batch_size: int
    """Samples a batch."""
    batch_ms: dict[str, float]
    """`summary` of the milliseconds a batch."""
    bytes_per_sample: float | None = None
    """Bytes that the room takes in or gives out a sample, for MB/s; None where that says nothing."""
    cpu_ms_per_sample: float | None = None
    """Milliseconds of CPU time a sample, over all threads and child processes; None where not measured."""
    setup_s: float = 0.0
    """Seconds before the room runs at its speed: opening, compilation, first touches; in no other figure."""
    tflop_per_s: float | None = None
    """Of convolutions and matrix products."""
    peak_gib: float | None = None
    """Device memory."""

    @property
    def samples_per_s(self) -> float:
        return 1000 * self.batch_size / self.batch_ms["median"]

    @property
    def mb_per_s(self) -> float | None:
        return None if self.bytes_per_sample is None else self.samples_per_s * self.bytes_per_sample / 1e6

    def to_table(self) -> dict[str, Any]:
        """The row as plain values for JSON, rates included; what was not measured is left out."""
        values = {**asdict(self), "samples_per_s": self.samples_per_s, "mb_per_s": self.mb_per_s}
        return {key: value for key, value in values.items() if value is not None}


def measure(
    name: str,
    work: Callable[[], int],
    *,
    batch_size: int,
    num_repeats: int,
    device: torch.device | None = None,
    bytes_per_sample: float | None = None,
    opening_s: float = 0.0,
    prepare: Callable[[], object] | None = None,
) -> Row:
    """A row from doing `work` once to warm up and then `num_repeats` times.

    Args: `work` handles some samples and returns how many; on a CUDA `device` it is waited for. `prepare` comes before
    each time and is not timed. `opening_s` passed before and is added to `setup_s`, with what the first time took
    longer than the median of the others.
    """
    times = []
    for _ in range(num_repeats + 1):
        if prepare is not None:
            prepare()
        cpu_before_s, started = cpu_s(), time.perf_counter()
        count = work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(((time.perf_counter() - started) / count, (cpu_s() - cpu_before_s) / count, count))
    (first_s, _, first_count), *counted = times
    usual_s = statistics.median(wall_s for wall_s, _, _ in counted)
    return Row(
        name=name,
        batch_size=batch_size,
        batch_ms=summary([1000 * wall_s * batch_size for wall_s, _, _ in counted]),
        bytes_per_sample=bytes_per_sample,
        cpu_ms_per_sample=1000 * statistics.fmean(used_s for _, used_s, _ in counted),
        setup_s=opening_s + max(0.0, first_s - usual_s) * first_count,
    )


def cpu_s() -> float:
    """Seconds of CPU time so far, of this process's threads and of its children (a loader's worker processes)."""
    times = os.times()
    used_s = times.user + times.system + times.children_user + times.children_system
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it ended just now
            # proc(5): the name, in brackets, may hold spaces; utime and stime are the 12th and 13th word after it.
            words = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            used_s += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return used_s


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, range and number of measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: by the clock on a CPU, between events on a device."""
    if device.type == "cpu":
        started = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Keeps the device busy while the host launches, so that work that does not wait is timed without the host.
    torch.cuda._sleep(20_000_000)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


class Marks:
    """Points in time between pieces of work that are launched one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the time: of the clock on a CPU; on a device, when it gets there, without waiting for it."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def between_ms(self) -> list[float]:
        """Milliseconds from each mark to the next. Waits for the device."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type == "cpu":
            return [1000 * (after - before) for before, after in pairs]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) for before, after in pairs]
