"""Why measured figures are not to be relied on: they contradict each other, they vary, or the machine was busy."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fast_essl.bench import loading, step
from fast_essl.bench.measuring import Row, cpu_s
from fast_essl.bench.table import number
from loaders.machine import num_cores, own_cores

TOLERANCE = 0.15
"""How far two figures' ranges may lie apart, as a share, before they contradict each other."""
LOST_TIMES = 2
"""A run on a CPU that takes so many times as long as loader and step one after the other loses time elsewhere."""
MOST_SPREAD = 2
"""The slowest round may take so many times as long as the fastest."""
BUSY_SHARE = 0.15
"""Other processes may take so much of the cores that the bench needs, as a share."""
STEAL_SHARE = 0.05
"""The hypervisor may keep back so much of the time of the cores."""

_WHOLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (step.WHOLE, (loading.LOADER, step.UPLOAD, step.STEP)),
    (step.STEP, (step.VIEW_STAGE, step.FORWARD_BACKWARD, step.OPTIMIZER)),
)
"""A row that has all the work of others in it, so that none of those can be slower."""


@dataclass(frozen=True, kw_only=True)
class MachineUse:
    """What else happened on the cores that this process may run on, while something was measured."""

    seconds: float
    num_cores: int
    """Threads that this process can run at the same time."""
    cores_left: float | None
    """Mean number of cores that other processes left; None where /proc/stat does not tell."""
    cores_used_by_others: float | None
    """Mean number of cores that other processes kept busy."""
    steal_share: float | None
    """Share of the cores' time that the hypervisor gave to other machines."""
    load_average_before: float
    """Processes that ran or waited, over the minute before."""
    load_average_after: float

    def to_table(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Watch:
    """Observes the machine from its making on."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._load_average = os.getloadavg()[0]
        self._started, self._own_s, self._times = time.perf_counter(), cpu_s(), _core_times(stat)

    def use(self) -> MachineUse:
        """What happened since."""
        seconds, own_s = time.perf_counter() - self._started, cpu_s() - self._own_s
        left = others = steal = None
        before, after = self._times, _core_times(self._stat)
        if before and after and seconds > 0:
            busy_s, steal_s = after[0] - before[0], after[1] - before[1]
            others = max(0.0, busy_s - own_s) / seconds
            left = after[2] - others
            steal = steal_s / (seconds * after[2])
        return MachineUse(
            seconds=seconds,
            num_cores=num_cores(),
            cores_left=left,
            cores_used_by_others=others,
            steal_share=steal,
            load_average_before=self._load_average,
            load_average_after=os.getloadavg()[0],
        )


def _core_times(stat: Path) -> tuple[float, float, int] | None:
    """Seconds that the cores of this process were busy, and that were stolen from them, since the start; their number.

    None where the kernel does not tell. See proc(5): the words after a core's name are user, nice, system, idle,
    iowait, irq, softirq, steal.
    """
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    mine = {f"cpu{core}" for core in own_cores()}
    ticks = [[int(word) for word in words[1:9]] for words in lines if words and words[0] in mine]
    if not ticks or any(len(core) < 8 for core in ticks):
        return None
    per_s = os.sysconf("SC_CLK_TCK")
    return sum(sum(core[:3]) for core in ticks) / per_s, sum(core[7] for core in ticks) / per_s, len(ticks)


def busy(use: MachineUse) -> list[str]:
    """What of the machine's use makes its figures doubtful, a sentence each."""
    found = []
    if use.cores_left is not None and use.cores_left < (1 - BUSY_SHARE) * use.num_cores:
        found.append(
            f"other processes kept {number(use.cores_used_by_others)} cores busy, which left "
            f"{number(max(0.0, use.cores_left))} of the {use.num_cores} that this one would use"
        )
    if use.steal_share is not None and use.steal_share > STEAL_SHARE:
        found.append(f"the hypervisor gave {use.steal_share:.0%} of the cores' time to other machines")
    return found


def varying(rows: Mapping[str, Row]) -> list[str]:
    """The throughputs of the verdict whose rounds differ too much, a sentence each."""
    found = []
    for name in (loading.LOADER, step.STEP, step.WHOLE):
        low, high = _range(rows[name])
        if high > MOST_SPREAD * low:
            found.append(f"the rounds of {name} go from {number(low)} to {number(high)} samples/s")
    return found


def contradictions(rows: Mapping[str, Row], *, on_gpu: bool, same_decoder: bool) -> list[str]:
    """Pairs of figures that cannot both be true, beyond their ranges and `TOLERANCE`, a sentence each.

    Args: `rows` has loader, step and end to end, and any others. `same_decoder` tells whether the loader decodes all
    samples, and does it as the row decode does.
    """
    wholes = [*_WHOLES, (loading.LOADER, (loading.DECODE, loading.CROPS))] if same_decoder else _WHOLES
    found = []
    for whole, parts in wholes:
        for part in parts:
            if part not in rows:
                continue
            at_least, at_most = _range(rows[whole])[0], _range(rows[part])[1]
            if at_least > (1 + TOLERANCE) * at_most:
                found.append(
                    f"{whole} does {number(at_least)} samples/s or more, and {part}, which is a part of it, "
                    f"{number(at_most)} or less"
                )
    # On a GPU the rooms work beside one another, and what is lost between them has a verdict of its own.
    one_after_the_other = 1 / sum(1 / _range(rows[name])[0] for name in (loading.LOADER, step.STEP))
    at_most = _range(rows[step.WHOLE])[1]
    if not on_gpu and LOST_TIMES * at_most < one_after_the_other:
        found.append(
            f"{step.WHOLE} does {number(at_most)} samples/s or less, and loader and step, one after the other, would "
            f"do {number(one_after_the_other)} or more"
        )
    return found


def _range(row: Row) -> tuple[float, float]:
    """The least and the most samples/s of a row's rounds."""
    return 1000 * row.batch_size / row.batch_ms["max"], 1000 * row.batch_size / row.batch_ms["min"]
