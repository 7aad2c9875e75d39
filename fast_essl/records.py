"""Results on the disk: written whole or not at all, and read with a word about what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loaders.errors import DataError

CHECKSUM = "checksum"
"""Key of a result's checksum over the rest of it."""

_REQUIRED_METRICS = {
    "step": ("step", "epoch", "elapsed_s", "loss", "samples_per_s", "data_wait_share"),
    "eval": ("step", "epoch", "elapsed_s"),
}
"""Numbers that every line of a type holds."""


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts as one file, under its name only when it is whole and on the disk.

    Errors: `DataError` for a folder, a pipe or a device of that name; `OSError` that names the file, with the one of
    before untouched and nothing left behind.
    """
    refuse_irregular(path)
    _remove_left_over(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            for content in parts:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path, "not written") from error
        raise
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise named(error, path, "written, but perhaps not on the disk yet") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. Errors: as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int = 2) -> None:
    """Write a JSON file. Errors: as `write_bytes`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def named(error: OSError, path: Path, remark: str = "") -> OSError:
    """The same error with the file's name, which one from an open file lacks."""
    reason = error.strerror or str(error)
    return OSError(error.errno, f"{reason}; {remark}" if remark else reason, str(path))


def refuse_irregular(path: Path) -> None:
    """Errors: `DataError` for what is there and no regular file, or link to one."""
    if path.exists() and not path.is_file():
        raise _irregular(path)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a file of a folder that this program fills, never waiting for the other end of a pipe.

    Args: `flags` as for `os.open`.
    Errors: `DataError` for anything but a regular file; `OSError`.
    """
    # A pipe that nobody reads is an error when it is opened for writing without blocking (ENXIO): looked at before.
    refuse_irregular(path)
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    file = open(descriptor, "rb" if flags == os.O_RDONLY else "r+b", buffering=0)  # noqa: SIM115 - the caller's
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise _irregular(path)
    return file


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Errors: as `open_regular`; `OSError` with the file's name."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise named(error, path) from error


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a file of `write_json` that holds an object.

    Args: `remedy` ends the message of a damaged file: how it is made again.
    Errors: `DataError` in one line for a damaged, cut or empty one; `OSError`.
    """
    value = read_any_json(path, remedy=remedy)
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object; {remedy}")
    return value


def read_any_json(path: Path, *, remedy: str) -> Any:
    """As `read_json`, for any value."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged, or not JSON ({error}); {remedy}") from None


def read_earlier(path: Path) -> dict[str, Any] | None:
    """What was measured before; None where nothing was, or, with a remark, where the file is damaged."""
    if not path.exists():
        return None
    try:
        return read_json(path, remedy="measured again")
    except DataError as error:
        remark(str(error))
        return None


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A result with its checksum, which tells one that was edited or damaged."""
    return {**values, CHECKSUM: _checksum(values)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether a result is as it was written."""
    return values.get(CHECKSUM) == _checksum(values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a killed run has not finished is left out.

    Errors: `DataError` naming the line that is damaged or holds anything but finite numbers; `OSError`.
    """
    lines = []
    for number, text in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: damaged ({error}); remove that line") from None
        required = _REQUIRED_METRICS.get(str(line.get("type"))) if isinstance(line, dict) else None
        if required is None:
            raise DataError(f"{path}, line {number}: not a line of metrics; remove it")
        for name in {*required, *line} - {"type"}:
            value = line.get(name)
            if not is_number(value) and (value is not None or name in required):
                raise DataError(f"{path}, line {number}: {name} is {value!r}, not a number; remove that line")
        lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether a value that was read is a finite number; `true` is none."""
    return type(value) in (int, float) and -math.inf < value < math.inf


@functools.cache
def remark(text: str) -> None:
    """Say a line on stderr, once."""
    if sys.stderr is not None:
        print(f"fast-essl: {text}", file=sys.stderr)


def _checksum(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _irregular(path: Path) -> DataError:
    what = "a folder" if path.is_dir() else "a pipe, a device or a socket"
    return DataError(f"{path}: is {what}, not a file; remove it")


def _remove_left_over(path: Path) -> None:
    """Remove what killed processes left of this file; those of living ones are being written."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not (int(number) != os.getpid() and _is_alive(int(number))):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
