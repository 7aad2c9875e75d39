"""What this process may use of the machine: its cores and its free memory, within the limits of its cgroups.

A container's limits stand in cgroups, version 1 or 2, of which a process is in one a controller. Each of their parents
may be limited as well, and the least counts. `/proc/cpuinfo` and `/proc/meminfo` know nothing of them.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/")
"""Where `proc` and `sys` lie; tests have their own."""


def own_cores() -> set[int]:
    """The numbers of the cores that the process may run on."""
    return os.sched_getaffinity(0)


def num_cores(root: Path = ROOT) -> int:
    """Threads that can compute at the same time: the cores that the process may run on, within its cgroups' quota.

    A quota that is no whole number is rounded up: three threads share 2.5 cores and use them whole, two would leave
    half a core idle. Half a core is one thread.
    """
    cores = len(own_cores())
    for folder in _cgroup_folders(root, "cpu"):
        quota, period = _cpu_quota(folder)
        if quota > 0:
            cores = min(cores, -(-quota // period))
    return cores


def free_memory_bytes(root: Path = ROOT) -> int:
    """Bytes that can be allocated, or cached, before something has to go.

    The least of what the kernel counts as available and what each of the process's cgroups has left. File pages that
    were read once and may be dropped (`inactive_file`) count as free.
    """
    free = _meminfo_bytes(root, "MemAvailable")
    for limit, used, droppable in map(_memory, _cgroup_folders(root, "memory")):
        if limit is not None:
            free = min(free, max(0, limit - max(0, used - droppable)))
    return free


def total_memory_bytes(root: Path = ROOT) -> int:
    """Bytes of memory, the machine's or the least limit of the process's cgroups."""
    limits = [limit for limit, _, _ in map(_memory, _cgroup_folders(root, "memory")) if limit is not None]
    return min([_meminfo_bytes(root, "MemTotal"), *limits])


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of the process's cgroups that may limit it, its own first, then the parents.

    In a container the kernel may tell a path of the host's, whose folders the container does not see: it sees its own
    cgroup where the controller is mounted. So folders that are not there are left out.
    """
    path = root / "proc/self/cgroup"
    folders = []
    # A line is number:controllers:path; version 2 has the number 0, no controllers, and one path for all of them.
    for line in path.read_text().splitlines() if path.exists() else []:
        number, controllers, own = line.split(":", 2)
        if number == "0":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        parts = [part for part in own.split("/") if part not in ("", "..")]
        for mount in mounts:
            folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _cpu_quota(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time in each period of so many; the quota is 0 or less where there is none."""
    both = _text(folder / "cpu.max").split()
    if not both:
        both = [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
    quota, period = both
    return (0, 1) if quota in ("", "max") or period in ("", "0") else (int(quota), int(period))


def _memory(folder: Path) -> tuple[int | None, int, int]:
    """Bytes of a cgroup and all below it: its limit (None without one), what is used, what of that can be dropped."""
    statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines())
    if (folder / "memory.max").exists():
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        droppable = statistics.get("inactive_file", "0")
    else:
        # Version 1, whose figures without `total_` leave the cgroups below out; without a limit it has 2⁶³ or so.
        limit, used = _text(folder / "memory.limit_in_bytes"), _text(folder / "memory.usage_in_bytes")
        droppable = statistics.get("total_inactive_file", "0")
    return None if limit in ("", "max") else int(limit), int(used or 0), int(droppable)


def _text(path: Path) -> str:
    """The file without the spaces around; empty where there is none, or where it may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _meminfo_bytes(root: Path, key: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {key}")
