"""A file and its manifest get their names: both or neither, and never in the place of anything else.

While it is written, the new file is `.NAME.part`, locked by the process that writes it. What a process that was killed
left behind has no lock: the next conversion to the name removes it.

File and manifest change as one, though each has its own name: the new manifest is put beside the old one as
`NAME.json.next`, then the file gets its name, then the manifest. Readers take the `.next` one when it alone matches
(`loaders.manifest.open_checked`), so that whenever the process is killed there is an old pair or a new pair.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loaders.errors import DataError
from loaders.held_file import cannot_write
from loaders.manifest import Manifest, manifest_path, next_manifest_path

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


def resolve_destination(dest: Path) -> Path:
    """Where a symbolic link leads; any other path as it is. Errors: DataError for a circle of links."""
    try:
        return dest.resolve() if dest.is_symlink() else dest
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its links lead in a circle"
        raise DataError(f"{dest}: cannot be a file ({reason}); choose another place") from error


def check_destination(dest: Path, overwrite: bool) -> None:
    """Whether the file and its manifest may be made. Errors: DataError for what is there and not to be replaced."""
    try:
        if not dest.parent.is_dir():
            raise DataError(f"{dest.parent}: is not a folder that exists; make it first")
        if dest.is_dir():
            raise DataError(
                f"{dest}: is a folder; give the name of the file to make, as {dest / 'train.beton'}"
            )
        for path in (dest, manifest_path(dest), next_manifest_path(dest)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode):
                raise DataError(
                    f"{path}: is not a regular file, and only those are replaced; choose another name"
                )
            # A manifest that waits for its name was left by a conversion that was killed.
            if not overwrite and path != next_manifest_path(dest):
                raise DataError(
                    f"{path}: exists; remove it, choose another name, or replace it with --overwrite"
                )
    except OSError as error:
        raise DataError(f"{dest}: cannot be a file ({error.strerror}); choose another place") from error


@contextmanager
def part_file(dest: Path) -> Iterator[Path]:
    """The file to write before it gets its name: empty, locked, and removed at the end if it is still there.

    Errors: DataError when another process is writing it, or it cannot be made.
    """
    part = _part_path(dest)
    descriptor = _open_locked(part, dest)
    try:
        yield part
    finally:
        try:
            # By now the name may be another process's.
            if _is_named(part, descriptor):
                part.unlink()
        finally:
            os.close(descriptor)


def publish(manifest: Manifest, part: Path, dest: Path, *, overwrite: bool) -> None:
    """Give a whole file and its manifest their names.

    Errors: DataError when something came into the way meanwhile, or the folder cannot be written to. There is then the
    pair of before, or none; where a pair is replaced and only the last step fails, the new one.
    """
    check_destination(dest, overwrite)
    waiting = next_manifest_path(dest)
    try:
        new = part.stat()
        try:
            with waiting.open("wb") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(dest.parent)
            if overwrite:
                part.replace(dest)
            else:
                _rename_to_new(part, dest)
        except BaseException:
            if not (dest.exists() and os.path.samestat(new, dest.stat())):
                waiting.unlink(missing_ok=True)
            raise
        try:
            waiting.replace(manifest_path(dest))
            _sync_folder(dest.parent)
        except OSError:
            if not overwrite:
                for path in (dest, waiting, manifest_path(dest)):
                    path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(dest.parent, error) from error


def _part_path(dest: Path) -> Path:
    return dest.with_name(f".{dest.name}.part")


def _open_locked(part: Path, dest: Path) -> int:
    """A descriptor that locks `part`, which is made where it is missing."""
    busy = DataError(
        f"{dest}: another process is converting to this name; wait for it or choose another name"
    )
    while True:
        try:
            descriptor = os.open(
                part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
            )
        except OSError as error:
            raise cannot_write(dest.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise cannot_write(dest.parent, error) from error
            # A file system without locks: whoever finds the file cannot know whether somebody is writing it.
            if os.fstat(descriptor).st_size:
                os.close(descriptor)
                raise DataError(
                    f"{part}: exists; if no other process is converting to {dest.name}, remove it"
                ) from error
            return descriptor
        # The file may have got its name, or been removed, between our opening and our lock.
        if _is_named(part, descriptor):
            status = os.fstat(descriptor)
            if status.st_size == 0 and status.st_nlink == 1:
                return descriptor
            # Left by a process that was killed. Not to be written to: it may be the published file's second name.
            part.unlink()
        os.close(descriptor)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _rename_to_new(part: Path, dest: Path) -> None:
    """Give a file its name unless the name is taken."""
    try:
        os.link(part, dest)
    except FileExistsError as error:
        raise DataError(
            f"{dest}: was made by somebody else meanwhile, and is left as it is; remove it or choose another name"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: the name was free a moment ago.
        part.replace(dest)
    else:
        part.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
