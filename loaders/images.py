"""Images by sample index, as Pillow decodes them: from a `.beton` file, or straight from an image folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.beton import IMAGE_JPEG, BetonTables, read_tables
from loaders.errors import DataError
from loaders.manifest import Manifest, check_opening

FOLDER_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class BetonImages:
    """A `.beton` file that matches its manifest."""

    path: Path
    manifest: Manifest
    tables: BetonTables

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    @property
    def heights(self) -> np.ndarray:
        return self.tables.heights

    @property
    def widths(self) -> np.ndarray:
        return self.tables.widths

    @property
    def labels(self) -> np.ndarray:
        return self.tables.labels

    def image(self, index: int) -> Image.Image:
        """One sample as a Pillow RGB image.

        Errors: `DataError` naming file and sample when it does not decode.
        """
        start, size = int(self.tables.data_ptrs[index]), int(self.tables.data_sizes[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(size)
        if self.tables.modes[index] != IMAGE_JPEG:
            shape = (int(self.heights[index]), int(self.widths[index]), 3)
            return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise undecodable(self.path, index) from error


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """An image folder, one directory a class; sizes are read from the files' headers on opening."""

    path: Path
    class_names: tuple[str, ...]
    files: list[Path]
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray

    def image(self, index: int) -> Image.Image:
        """One sample as a Pillow RGB image.

        Errors: `DataError` naming the file when it does not decode.
        """
        try:
            return Image.open(self.files[index]).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self.files[index]}: does not decode as an image ({error})") from error


def undecodable(path: Path, index: int) -> DataError:
    """The error for a damaged sample; a reader may have seen the file change since it was opened."""
    return DataError(
        f"{path}: sample {index} does not decode; run 'fast-essl convert --verify {path}' and convert the data again"
    )


def open_beton(path: Path) -> BetonImages:
    """Open a `.beton` file.

    Errors: `DataError` when it is missing or does not match its manifest.
    """
    manifest = check_opening(path)
    return BetonImages(path=path, manifest=manifest, tables=read_tables(path))


def open_folder(path: Path) -> FolderImages:
    """Open an image folder with one directory a class.

    Errors: `DataError` when there is no class directory, no image, or a file that is not an image.
    """
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    pairs = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in FOLDER_EXTENSIONS
    ]
    if not pairs:
        raise DataError(f"{path}: no images in class directories; expected {path.name}/CLASS/IMAGE.jpg")
    sizes = []
    for file, _ in pairs:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{file}: is not an image ({error})") from error
    widths, heights = np.array(sizes, dtype=np.int32).T
    return FolderImages(
        path=path,
        class_names=tuple(classes),
        files=[file for file, _ in pairs],
        heights=heights,
        widths=widths,
        labels=np.array([label for _, label in pairs], dtype=np.int64),
    )
