"""Errors, and what a command says of them; without torch."""

from __future__ import annotations

import traceback
from pathlib import Path

from fast_essl.config import ConfigError
from loaders.errors import DataError

PACKAGES = Path(__file__).resolve().parents[1]
EXHAUSTED = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "can't start new thread",
)
"""What a RuntimeError says, in any case, when the machine or the device has no memory or no threads left."""


class NonFiniteLossError(Exception):
    """The loss stopped being a number; the message is one line with the step and the last good checkpoint."""


def explain(error: Exception) -> tuple[int, str] | None:
    """The exit code of a command that an error ended, and what to say in one line; None for a fault of fast_essl."""
    if isinstance(error, (ConfigError, DataError)):
        return 2, str(error)
    if isinstance(error, NonFiniteLossError):
        return 1, str(error)
    if isinstance(error, RecursionError):
        return 2, f"something that was read is nested too deeply{_place(error)}"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in EXHAUSTED)
    ):
        reason = str(error).partition("\n")[0] or "an allocation failed"
        return 1, (
            f"out of memory or threads: {reason}{_place(error)}; try a smaller train.batch_size, train.accumulate or "
            "a smaller network"
        )
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return 2, f"{error.filename}: {error.strerror}"
        return 2, f"{error.strerror or error}{_place(error)}"
    return None


def _place(error: Exception) -> str:
    """Where in our code it happened: the only thing to go by where an error names no file."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGES / "fast_essl") or path.is_relative_to(PACKAGES / "loaders"):
            place = f" (in {frame.name}, {path.relative_to(PACKAGES)}, line {frame.lineno})"
    return place
