"""Images by sample index, as Pillow decodes them: from a `.beton` file, or straight from an image folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from loaders.beton import IMAGE_JPEG, BetonTables
from loaders.block_check import BlockCheck
from loaders.checksum import checksum
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.manifest import Manifest, open_checked

FOLDER_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class BetonImages:
    """A `.beton` file that matches its manifest, kept open."""

    file: HeldFile
    manifest: Manifest
    tables: BetonTables
    block_check: BlockCheck | None
    """Of a file of 0.1.0, whose samples have no checksums."""

    @property
    def path(self) -> Path:
        return self.file.path

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

    def stored(self, index: int) -> bytes:
        """The stored bytes of one sample: a JPEG stream, or its pixels.

        Errors: `DataError` when they cannot be read or do not match their checksum.
        """
        data = self.file.read(int(self.tables.data_ptrs[index]), int(self.tables.data_sizes[index]))
        if self.tables.checksums is not None and checksum(data) != self.tables.checksums[index]:
            raise damaged(self.path, index)
        return data

    def image(self, index: int) -> Image.Image:
        """One sample as a Pillow RGB image.

        Errors: `DataError` naming file and sample when it is damaged or does not decode.
        """
        data = self.stored(index)
        if self.tables.modes[index] != IMAGE_JPEG:
            shape = (int(self.heights[index]), int(self.widths[index]), 3)
            return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))
        try:
            # Not `Image.open`, which refuses large images.
            return JpegImageFile(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise undecodable(self.path, index) from error

    def begin_epoch(self) -> None:
        """To be called before the first sample of an epoch.

        Errors: `DataError` when the file was changed or replaced since it was opened, or is damaged.
        """
        self.file.check_unchanged()
        if self.block_check is not None:
            self.block_check.start()
        self.check()

    def check(self) -> None:
        """To be called before every batch. Errors: `DataError` for damage that was found in the background."""
        if self.block_check is not None:
            self.block_check.raise_if_damaged()

    def close(self) -> None:
        """Close the file; once more is fine."""
        if self.block_check is not None:
            self.block_check.stop()
        self.file.close()


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
    """The error for a sample whose bytes are no image of the size in the tables."""
    return DataError(
        f"{path}: sample {index} does not decode; run 'fast-essl convert --verify {path}' and convert the data again"
    )


def damaged(path: Path, index: int) -> DataError:
    """The error for a sample whose bytes are not those that were written."""
    return DataError(
        f"{path}: sample {index} does not match its checksum: it was damaged or overwritten; run "
        f"'fast-essl convert --verify {path}', and restore the file from a copy or convert the data again"
    )


def open_beton(path: Path) -> BetonImages:
    """Open a `.beton` file; it stays open until `close`, or until nobody holds the result.

    Errors: `DataError` when it is missing or does not match its manifest.
    """
    file, manifest, tables = open_checked(path)
    block_check = None if manifest.has_checksums else BlockCheck(file, manifest)
    return BetonImages(file=file, manifest=manifest, tables=tables, block_check=block_check)


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
