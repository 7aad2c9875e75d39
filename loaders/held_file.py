"""A file that is kept open: what is read is what was opened, whatever becomes of its name."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from loaders.errors import DataError


class HeldFile:
    """One descriptor, opened once. Reading is safe from several threads, and after a fork.

    A file that is mapped into memory would kill the process if it were cut short; here that is an error.
    """

    def __init__(self, path: Path) -> None:
        """Open a file for reading; a pipe or a device is refused without waiting for it.

        Errors: `DataError` naming the file.
        """
        self.path = path
        try:
            # O_NONBLOCK, since to open a pipe otherwise waits for its writer.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise cannot_read(path, error) from error
        self._close = weakref.finalize(self, os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise DataError(f"{path}: is not a regular file; give one")
        self.num_bytes = status.st_size
        """When it was opened."""
        self._identity = _identity(status)

    @property
    def is_closed(self) -> bool:
        return not self._close.alive

    def read(self, start: int, num_bytes: int) -> bytes:
        """Exactly these bytes. Errors: `DataError` when the file has become shorter or cannot be read."""
        if self.is_closed:
            raise ValueError(f"{self.path}: the loader is closed")
        parts: list[bytes] = []
        remaining = num_bytes
        try:
            while remaining > 0:
                part = os.pread(self.descriptor, remaining, start + num_bytes - remaining)
                if not part:
                    raise DataError(
                        f"{self.path}: ends before byte {start + num_bytes}, and had {self.num_bytes} bytes when it "
                        "was opened; restore it from a copy or convert it again"
                    )
                parts.append(part)
                remaining -= len(part)
        except OSError as error:
            raise cannot_read(self.path, error) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_unchanged(self) -> bool:
        """Whether the name still means this file, and nothing was written to it since it was opened."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    def check_unchanged(self) -> None:
        """Errors: `DataError` naming the file when it was replaced, written to or removed; `ValueError` when closed."""
        if self.is_closed:
            raise ValueError(f"{self.path}: the loader is closed")
        if not self.is_unchanged():
            raise DataError(
                f"{self.path}: was changed, replaced or removed since it was opened; start again with the file "
                "that you want"
            )

    def close(self) -> None:
        """Close the file; once more is fine."""
        self._close()


def cannot_read(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(
        f"{path}: cannot be read ({error.strerror or error}); check the path, its permissions and the disk"
    )


def cannot_write(folder: Path, error: OSError) -> DataError:
    """The error for a folder in which the system does not let us write."""
    return DataError(
        f"{folder}: cannot be written to ({error.strerror or error}); free some space or choose another place"
    )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
