"""An image folder: one folder a class, any files below it, as torchvision's `ImageFolder` lays it out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loaders.convert.source import Sample, Source
from loaders.errors import DataError

_SPLITS: Final = frozenset({"train", "test", "val", "valid", "validation"})


def open_folder(folder: Path, split: str) -> Source:
    """The images of a folder: classes in the order of their names, then files in the order of theirs.

    Every file that is not hidden counts as an image, so that one which is none is reported. Only one class's
    file names are in memory at a time. Where all folders are splits (`train`, `val` ...), the one called
    `split` is taken.

    Errors: DataError if the folder is empty, has no class folders, or a class has no files.
    """
    classes = _class_folders(folder)
    if classes and _SPLITS.issuperset(classes):
        if split not in classes:
            raise DataError(
                f"{folder}: has no split {split!r}; give one of {', '.join(classes)} with --split"
            )
        folder = folder / split
        classes = _class_folders(folder)
    if not classes:
        found = "is empty" if not any(folder.iterdir()) else "has files but no class folders"
        raise DataError(f"{folder}: {found}; an image folder holds one folder a class with its images inside")
    num_samples = 0
    for name in classes:
        num_files = sum(1 for _ in _files(folder / name))
        if num_files == 0:
            raise DataError(f"{folder / name}: this class folder has no files; fill or remove it")
        num_samples += num_files

    def samples() -> Iterator[Sample]:
        for label, name in enumerate(classes):
            for path in sorted(_files(folder / name)):
                yield Sample(path, label, Path(path))

    return Source(
        description=f"image folder {folder}",
        class_names=tuple(classes),
        num_samples=num_samples,
        samples=samples,
    )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:  # os.walk would leave an unreadable folder out
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))
