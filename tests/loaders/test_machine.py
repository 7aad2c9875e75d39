"""Cores and free memory within the limits of cgroups, on folders that stand for /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loaders.machine import free_memory_bytes, num_cores, total_memory_bytes

MIB = 2**20
NO_LIMIT_V1 = 9223372036854771712
"""What version 1 says of a cgroup without a limit of memory: the last page below 2⁶³."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 cores and 1,000 MiB, 800 of them available."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    write(tmp_path, "proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemAvailable: {800 * 1024} kB\n")
    return tmp_path


def write(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def memory_v2(root: Path, folder: str, *, limit: object, used: int, inactive_file: int = 0) -> None:
    write(root, f"{folder}/memory.max", limit)
    write(root, f"{folder}/memory.current", used)
    write(root, f"{folder}/memory.stat", f"anon 1\ninactive_file {inactive_file}\nactive_file 7")


def test_without_cgroups(root: Path) -> None:
    assert num_cores(root) == 8
    assert free_memory_bytes(root) == 800 * MIB
    assert total_memory_bytes(root) == 1000 * MIB


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max", 8), ("50000", 1), ("100000", 1), ("250000", 3), ("300000", 3), ("9900000", 8)],
)
def test_a_quota_of_version_2(root: Path, quota: str, cores: int) -> None:
    write(root, "proc/self/cgroup", "0::/pod/container")
    write(root, "sys/fs/cgroup/pod/container/cpu.max", f"{quota} 100000")
    assert num_cores(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (25_000, 1), (125_000, 3), (200_000, 4)])
@pytest.mark.parametrize("folder", ["cpu,cpuacct/job", "cpu/job", "cpu"])
def test_a_quota_of_version_1(root: Path, folder: str, quota: int, cores: int) -> None:
    """Mounted under one name or both; in a container, at its own cgroup."""
    write(root, "proc/self/cgroup", "4:memory:/other\n3:cpu,cpuacct:/job\n0::/")
    write(root, f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us", quota)
    write(root, f"sys/fs/cgroup/{folder}/cpu.cfs_period_us", 50_000)
    assert num_cores(root) == cores


def test_the_least_of_all_parents_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/slice/pod/container")
    write(root, "sys/fs/cgroup/slice/pod/container/cpu.max", "400000 100000")
    write(root, "sys/fs/cgroup/slice/pod/cpu.max", "max 100000")
    write(root, "sys/fs/cgroup/slice/cpu.max", "200000 100000")
    write(root, "sys/fs/cgroup/another/cpu.max", "100000 100000")
    memory_v2(root, "sys/fs/cgroup/slice/pod/container", limit=600 * MIB, used=50 * MIB)
    memory_v2(root, "sys/fs/cgroup/slice/pod", limit=500 * MIB, used=400 * MIB)
    memory_v2(root, "sys/fs/cgroup/slice", limit="max", used=900 * MIB)
    memory_v2(root, "sys/fs/cgroup/another", limit=1, used=0)
    assert num_cores(root) == 2
    assert free_memory_bytes(root) == 100 * MIB
    assert total_memory_bytes(root) == 500 * MIB


def test_file_pages_of_version_2_are_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    memory_v2(root, "sys/fs/cgroup/job", limit=300 * MIB, used=290 * MIB, inactive_file=250 * MIB)
    assert free_memory_bytes(root) == 260 * MIB


def test_memory_of_version_1(root: Path) -> None:
    """Its figures of a cgroup alone leave out those below it; the sums with them begin with `total_`."""
    write(root, "proc/self/cgroup", "4:memory:/job")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", NO_LIMIT_V1)
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", 900 * MIB)
    folder = "sys/fs/cgroup/memory/job"
    write(root, f"{folder}/memory.limit_in_bytes", 200 * MIB)
    write(root, f"{folder}/memory.usage_in_bytes", 180 * MIB)
    write(root, f"{folder}/memory.stat", f"inactive_file 5\ntotal_inactive_file {30 * MIB}")
    assert free_memory_bytes(root) == 50 * MIB
    assert total_memory_bytes(root) == 200 * MIB


def test_both_versions_side_by_side(root: Path) -> None:
    """Version 2 may be mounted beside version 1's controllers, which have the limits."""
    write(root, "proc/self/cgroup", "2:cpu:/job\n0::/user")
    write(root, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", 300_000)
    write(root, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", 100_000)
    (root / "sys/fs/cgroup/unified/user").mkdir(parents=True)
    assert num_cores(root) == 3
    write(root, "sys/fs/cgroup/unified/user/cpu.max", "200000 100000")
    assert num_cores(root) == 2


def test_more_used_than_the_limit_is_nothing_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job")
    memory_v2(root, "sys/fs/cgroup/job", limit=100 * MIB, used=120 * MIB)
    assert free_memory_bytes(root) == 0


def test_a_path_of_the_host_that_the_container_does_not_see(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/../../docker/abc")
    memory_v2(root, "sys/fs/cgroup", limit=64 * MIB, used=0)
    write(root, "sys/fs/cgroup/cpu.max", "100000 100000")
    assert num_cores(root) == 1
    assert free_memory_bytes(root) == 64 * MIB


def test_this_machine() -> None:
    assert 1 <= num_cores() <= len(os.sched_getaffinity(0))
    assert 0 < free_memory_bytes() <= total_memory_bytes()


@pytest.mark.parametrize("package", ["loaders", "fast_essl", "benchmarks"])
def test_nobody_else_counts_cores_or_memory(package: str) -> None:
    own = ("sched_getaffinity", "cpu_count", "MemAvailable")
    sources = Path(__file__).parents[2].joinpath(package).rglob("*.py")
    found = {path.name for path in sources if any(word in path.read_text(encoding="utf-8") for word in own)}
    assert found == ({"machine.py"} if package == "loaders" else set())
