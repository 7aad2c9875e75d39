"""Files of 0.1.0 have no checksum for each sample: their blocks are checked once, while they are being used."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.manifest import Manifest, check_block

_LOG = logging.getLogger(__name__)
_said: set[Path] = set()

# A process that is forked while a thread hashes inherits OpenSSL's locks as they are: its own first digest, with which
# the torch loader's workers prove who they are, would wait for ever. So a fork waits for the end of the block.
_hashing = threading.Lock()
os.register_at_fork(
    before=_hashing.acquire, after_in_parent=_hashing.release, after_in_child=_hashing.release
)


class BlockCheck:
    """Compare every block of a file with the manifest, in a thread."""

    def __init__(self, file: HeldFile, manifest: Manifest) -> None:
        self._file, self._manifest = file, manifest
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._error: DataError | None = None

    def start(self) -> None:
        """Begin, the first time; says so in one line, once a process and file."""
        if self._thread is None:
            if self._file.path not in _said:
                _said.add(self._file.path)
                _LOG.warning(
                    "%s: was made by fast_essl 0.1.0 and has no checksum for each sample; its blocks are being "
                    "checked once in the background. Convert it again to have every sample checked when it is read",
                    self._file.path,
                )
            self._thread = threading.Thread(target=self._run, name="block check", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the check."""
        if self._thread is not None:
            self._thread.join()

    def raise_if_damaged(self) -> None:
        """Errors: `DataError` naming the first block that does not match, as soon as it is found."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread, which reads from the file."""
        self._stopping.set()
        self.wait()

    def _run(self) -> None:
        for index in range(len(self._manifest.block_sha256)):
            # A pause, in which who wants to fork gets the lock.
            if self._stopping.wait(0.001):
                return
            try:
                with _hashing:
                    check_block(self._file, self._manifest, index)
            except DataError as error:
                self._error = error
                return
