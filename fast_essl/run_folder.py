"""What stands in a run's folder: its names, the metrics file, the environment, and the lock that one process holds."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fast_essl import records
from fast_essl.config import ConfigError
from loaders.machine import num_cores

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
CHECKPOINT = "last.pt"
BACKBONE = "backbone.pt"
EVALUATION = "evaluation.json"
EVALUATION_RANDOM = "evaluation-random.json"


class MetricsFile:
    """metrics.jsonl: one JSON object a line, cut back to a checkpoint's length when a run resumes."""

    def __init__(self, path: Path, *, num_bytes: int = 0) -> None:
        """Open for appending after the first `num_bytes`; what a killed run wrote after its checkpoint is dropped.

        Errors: `DataError` for what is no regular file; `OSError` with the file's name.
        """
        self._path = path
        self._file = records.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        kept = self._file.read(num_bytes)
        whole = kept.rfind(b"\n") + 1
        if whole < num_bytes:
            records.remark(
                f"{path}: holds {whole} bytes of whole lines and had {num_bytes} when the checkpoint was written; "
                "the lines that are lost stay lost"
            )
        self._num_bytes = whole
        try:
            self._file.truncate(whole)
        except OSError as error:
            self._file.close()
            raise records.named(error, path) from error

    def write(self, **values: Any) -> None:
        """Append one line and hand it to the system.

        Errors: `ValueError` for a number that is not finite; `OSError` with the file's name, and no part of the line.
        """
        line = memoryview(json.dumps(values, allow_nan=False).encode() + b"\n")
        try:
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._num_bytes)
            raise records.named(error, self._path) from error
        self._num_bytes += len(line)

    def saved_num_bytes(self) -> int:
        """Length so far, all of it on the disk, for the checkpoint. Errors: `OSError` with the file's name."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise records.named(error, self._path) from error
        return self._num_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_LOCKS: list[BinaryIO] = []


def _let_go_of_locks() -> None:
    """A lock is held as long as any process has it open, and the loader's outlive a killed trainer by seconds."""
    while _LOCKS:
        _LOCKS.pop().close()


os.register_at_fork(after_in_child=_let_go_of_locks)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Create the folder, hold it for this process alone, and remove what a killed one was writing there.

    Errors: `ConfigError` while another one trains there; `DataError` where one of its names is no regular file;
    `OSError`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, METRICS, ENVIRONMENT, CHECKPOINT, BACKBONE):
        records.refuse_irregular(run_dir / name)
    with records.open_regular(run_dir / ".lock", os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run_dir}: another process trains here; choose another --run-dir") from None
        _LOCKS.append(lock)
        try:
            for left in run_dir.glob("*.part"):
                if left.is_file():
                    left.unlink(missing_ok=True)
            yield
        finally:
            _LOCKS.remove(lock)


def describe_environment(command: str) -> dict[str, Any]:
    """Date, machine, versions and commit: what a record needs beside the configuration."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "num_cores": num_cores(),
        "gpus": gpus,
        "versions": {"python": platform.python_version(), **_versions("torch", "numba", "numpy", "ffcv")},
        "commit": _commit(),
    }


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit of the checkout that this module lies in, with `-dirty` for changed files; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie below someone else's checkout
        return None
    # Not `git describe --dirty`, which writes to the checkout's index even without optional locks.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    commit = _answer([*git, "rev-parse", "--verify", "HEAD"])
    changed = _answer([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if commit and changed != "" else commit


def _answer(command: list[str]) -> str | None:
    """What a command prints; None where it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
