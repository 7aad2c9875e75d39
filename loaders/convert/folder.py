"""An image folder as a source: the images of its classes, class after class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loaders.convert.source import Sample, Source
from loaders.image_folder import list_folder
from loaders.names import printable


def open_folder(path: Path, split: str) -> Source:
    """The images of a folder: classes in the order of their names, then files in the order of theirs.

    Only one class's file names are in memory at a time. Where the folder holds splits (`train`, `val` ...), the
    one called `split` is taken.

    Errors: DataError as `list_folder`.
    """
    folder = list_folder(path, split)

    def samples() -> Iterator[Sample]:
        for label in range(len(folder.class_names)):
            for file in folder.files(label):
                yield Sample(printable(file), label, Path(file))

    return Source(
        description=f"image folder {printable(folder.path)}",
        class_names=folder.class_names,
        num_samples=sum(folder.num_files),
        samples=samples,
    )
