"""What a process does to the files below a folder, step by step, so that any one of the steps can fail or be its last.

Python's own writing is taken over: `open`, the writing of what it returned, and the functions of `os` that change
files. A write is one that reaches the system, after the buffer. What compiled code writes is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STORED = ("open", "write", "truncate", "fsync", "rename", "link", "mkdir")
"""The steps that a full disk or a broken one can refuse."""
_OF_ONE_PATH = {"mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "truncate": "truncate"}
_OF_TWO_PATHS = {"rename": "rename", "replace": "rename", "link": "link", "symlink": "link"}
_OF_A_DESCRIPTOR = {
    "fsync": "fsync",
    "fdatasync": "fsync",
    "ftruncate": "truncate",
    "posix_fallocate": "write",
    "write": "write",
    "pwrite": "write",
    "writev": "write",
    "sendfile": "write",
    "copy_file_range": "write",
}


@dataclass(frozen=True, kw_only=True)
class StepFault:
    """What happens at one step."""

    step: int
    """Counted from 1."""
    what: Literal["SIGKILL", "SIGTERM", "full", "broken"]
    """A signal just before the step; or its failure, with ENOSPC for this and all later writes, or with EIO once."""
    torn: bool = False
    """Where the step is a write, half of it is written first."""


class FileSteps:
    """Counts the steps of this process and injects one fault; `install` cannot be undone, so only in a child."""

    def __init__(self, folder: Path, fault: StepFault | None = None) -> None:
        self.names: list[str] = []
        """What was done, as `write last.pt.part`."""
        self._folder = f"{folder.resolve()}{os.sep}"
        self._fault = fault
        self._is_full = False

    def install(self) -> FileSteps:
        """Take over the functions of this process."""
        self._open = io.open
        self._readlink = os.readlink
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        for name, step in _OF_ONE_PATH.items():
            self._take_over(name, step, lambda path, *_: path)
        for name, step in _OF_TWO_PATHS.items():
            self._take_over(name, step, lambda _, path, *__: path)
        for name, step in _OF_A_DESCRIPTOR.items():
            self._take_over(name, step, lambda descriptor, *_: descriptor)
        os.open = self._os_opened(os.open)  # type: ignore[assignment]
        return self

    def before(self, step: str, target: Any, first_half: Callable[[], object] | None = None) -> None:
        """Count a step and let it fail where it is the one that is to. Errors: `OSError`, the injected one."""
        path = self._path(target)
        if path is None:
            return
        self.names.append(f"{step} {os.path.basename(path)}")
        named = (path,) if step in ("open", "rename", "link", "mkdir") else ()
        if self._is_full and step == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fault = self._fault
        if fault is None or fault.step != len(self.names):
            return
        if fault.torn and first_half is not None:
            first_half()
        if fault.what in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), signal.Signals[fault.what])
        elif fault.what == "full":
            self._is_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)
        else:
            raise OSError(errno.EIO, os.strerror(errno.EIO), *named)

    def _path(self, target: Any) -> str | None:
        """The path of a file below the folder, or None."""
        try:
            path = self._readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            path = os.path.abspath(os.fspath(path))
        except (OSError, TypeError):
            return None
        path = os.fsdecode(path)
        # The folder itself counts: its fsync makes names last.
        return path if f"{path}{os.sep}".startswith(self._folder) else None

    def _take_over(self, name: str, step: str, target: Callable[..., Any]) -> None:
        function = getattr(os, name)

        def taken_over(*arguments: Any, **options: Any) -> Any:
            self.before(step, target(*arguments))
            return function(*arguments, **options)

        setattr(os, name, taken_over)

    def _os_opened(self, function: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.before("open", path)
            return function(path, flags, *arguments, **options)

        return opened

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As `open`, over a `_CountedFile` where the file is to be written."""
        if not set(mode) & set("wax+") or self._path(file) is None:
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            self.before("open", file)
        raw = _CountedFile(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        kind: Any = io.BufferedRandom if "+" in mode else io.BufferedWriter
        buffered = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


class _CountedFile(io.FileIO):
    """A file whose writes are steps."""

    def __init__(self, steps: FileSteps, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd, opener)
        self._steps = steps

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        num_written = 0

        def write_half() -> None:
            nonlocal num_written
            num_written = super(_CountedFile, self).write(content[: content.nbytes // 2])

        self._steps.before("write", self.fileno(), write_half)
        # A process that lives on after its SIGTERM writes the other half.
        return num_written + super().write(content[num_written:])

    def truncate(self, size: int | None = None) -> int:
        self._steps.before("truncate", self.fileno())
        return super().truncate(size)
