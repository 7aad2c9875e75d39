"""What an image folder holds, for the conversion and for the loaders that read one: one folder a class.

Every file below a class folder counts as an image, as in torchvision's `ImageFolder` but for two things: what is
hidden (`.git`, `.DS_Store`) is left away, and a file of any extension counts, so that one which is no image is
reported. Links are followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loaders.errors import DataError
from loaders.names import check_class_names, printable

SPLITS: Final = frozenset({"train", "test", "val", "valid", "validation"})
_SHOWN_FOLDERS: Final = 10


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The classes of an image folder, in the order of their names."""

    path: Path
    class_names: tuple[str, ...]
    num_files: tuple[int, ...]
    """Of each class, when it was opened."""

    def files(self, label: int) -> list[str]:
        """The paths of a class, in their order; only these are in memory.

        Errors: DataError if they are not as many as before, or a folder cannot be read.
        """
        folder = self.path / self.class_names[label]
        found = sorted(_files(folder))
        if len(found) != self.num_files[label]:
            raise DataError(
                f"{printable(folder)}: had {self.num_files[label]} files at first and has {len(found)} now; "
                "start again when it no longer changes"
            )
        return found


def list_folder(path: Path, split: str | None = None) -> ImageFolder:
    """List the classes of an image folder.

    Args:
        split: which of its folders to take, where `path` holds splits (`train`, `val` ...) that hold the classes.
            A name other than "train" must be there. None where `path` must hold the classes itself.

    A folder holds splits if all its folders have the usual names of splits; or if one is called `split` and all
    files lie a level deeper than those of classes.

    Errors: DataError if the folder or a class is empty, there are no class folders, a link leads nowhere or in a
    circle, a class name cannot be shown, or something cannot be read.
    """
    try:
        return _list(path, split)
    except OSError as error:
        raise unreadable(error, path) from error


def unreadable(error: OSError, path: Path) -> DataError:
    """The error for a source that the system does not let us read."""
    return DataError(
        f"{printable(error.filename or path)}: cannot be read ({error.strerror or error}); check it and its permissions"
    )


def _list(path: Path, split: str | None) -> ImageFolder:
    classes = _class_folders(path)
    if _holds_splits(path, classes, split or "train"):
        if split not in classes:
            how = "with --split" if split else "itself"
            what = f"has no split {split!r}" if split else "holds splits and not classes"
            raise DataError(f"{printable(path)}: {what}; give one of {', '.join(classes)} {how}")
        path = path / split
        classes = _class_folders(path)
    elif split not in (None, "train") and classes:
        shown = ", ".join(map(printable, classes[:_SHOWN_FOLDERS]))
        more = " ..." if len(classes) > _SHOWN_FOLDERS else ""
        raise DataError(
            f"{printable(path)}: has no split {split!r}; its folders are {shown}{more}: if they are classes, "
            "leave --split away"
        )
    if not classes:
        found = "is empty" if not any(path.iterdir()) else "has files but no class folders"
        raise DataError(
            f"{printable(path)}: {found}; an image folder holds one folder a class with its images inside"
        )
    check_class_names(classes, printable(path))
    num_files = []
    for name in classes:
        num_files.append(sum(1 for _ in _files(path / name)))
        if num_files[-1] == 0:
            raise DataError(f"{printable(path / name)}: this class folder has no files; fill or remove it")
    return ImageFolder(path=path, class_names=tuple(classes), num_files=tuple(num_files))


def _holds_splits(path: Path, classes: list[str], split: str) -> bool:
    if classes and SPLITS.issuperset(classes):
        return True
    return split in classes and not any(_holds_files(path / name) for name in classes)


def _holds_files(folder: Path) -> bool:
    return any(not _is_folder(entry) for entry in _entries(folder))


def _class_folders(folder: Path) -> list[str]:
    names = []
    for entry in _entries(folder):
        if _is_folder(entry):
            names.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            # It may have been a class, and without it the labels of those behind it would be others.
            raise DataError(
                f"{printable(entry.path)}: is a link to {printable(os.readlink(entry.path))}, which is not there; "
                "restore or remove it"
            )
    return sorted(names)


def _files(folder: Path) -> Iterator[str]:
    """The paths of all files below a class folder, links to folders followed."""
    # What a link must not lead to, or it would be followed for ever: the folders that it stands in.
    above = frozenset(
        _identity(parent) for parent in (folder.parent.resolve(), *folder.parent.resolve().parents)
    )
    waiting = [(os.fspath(folder), above)]
    while waiting:
        path, above = waiting.pop()
        identity = _identity(path)
        if identity in above:
            raise DataError(
                f"{printable(path)}: is a link to a folder that it stands in ({printable(os.path.realpath(path))}), "
                "a circle; remove it"
            )
        for entry in _entries(path):
            if _is_folder(entry):
                waiting.append((entry.path, above | {identity}))
            else:
                yield entry.path


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise unreadable(error, Path(folder)) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise unreadable(error, Path(entry.path)) from error


def _identity(path: Path | str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(error, Path(path)) from error
    return status.st_dev, status.st_ino
