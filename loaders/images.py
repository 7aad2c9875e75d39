"""Images by sample index, as Pillow decodes them: from a `.beton` file, or straight from an image folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from loaders.beton import IMAGE_JPEG, BetonTables
from loaders.block_check import BlockCheck
from loaders.checksum import checksum
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.image_file import (
    JPEG_FORMATS,
    MAX_PIXELS,
    is_upright,
    open_image,
    open_image_file,
    quiet_pillow,
    read_image_file,
    upright_rgb,
    upright_size,
)
from loaders.image_folder import list_folder, unreadable
from loaders.manifest import Manifest, open_checked
from loaders.names import printable

_PLAIN: Final = {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P")}
"""Formats and modes, as Pillow names them, that DALI decodes to the same pixels."""


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
    """An image folder, one folder a class; sizes are read from the files' headers on opening.

    The same classes, images and upright pixels that conversion would store: those of `loaders.image_folder` and
    `loaders.image_file`. What only conversion finds are wrong bytes within a JPEG.
    """

    path: Path
    class_names: tuple[str, ...]
    files: list[Path]
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray
    plain: np.ndarray
    """(N,) bool: upright JPEGs, and upright PNGs of 8 bits without transparency: what every decoder reads alike."""

    def image(self, index: int) -> Image.Image:
        """One sample as a Pillow RGB image, upright.

        Errors: `DataError` naming the file when it does not decode, or is of another size than when it was opened.
        """
        file, size = self.files[index], (int(self.widths[index]), int(self.heights[index]))
        try:
            with quiet_pillow(MAX_PIXELS):
                image = upright_rgb(open_image(read_image_file(file)))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises anything at all on damaged files
            raise _unfit(file, error) from error
        if image.size != size:
            raise DataError(
                f"{printable(file)}: is {image.width}x{image.height} and was {size[0]}x{size[1]} when it was opened; "
                "open it again, or convert the folder if it did not change"
            )
        return image


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
    """Open an image folder with one folder a class.

    Errors: `DataError` as `list_folder`, and for a file that is not an image, or one of too many pixels.
    """
    folder = list_folder(path)
    files = [Path(file) for label in range(len(folder.class_names)) for file in folder.files(label)]
    headers = [_header(file) for file in files]
    return FolderImages(
        path=folder.path,
        class_names=folder.class_names,
        files=files,
        heights=np.array([header.height for header in headers], dtype=np.int32),
        widths=np.array([header.width for header in headers], dtype=np.int32),
        labels=np.repeat(np.arange(len(folder.class_names), dtype=np.int64), folder.num_files),
        plain=np.array([header.plain for header in headers], dtype=bool),
    )


class _Header(NamedTuple):
    width: int
    height: int
    plain: bool


def _header(file: Path) -> _Header:
    """What an image file says of itself, upright."""
    try:
        with quiet_pillow(None), open_image_file(file) as image:
            width, height = upright_size(image)
            kind = ("JPEG" if image.format in JPEG_FORMATS else image.format, image.mode)
            plain = kind in _PLAIN and is_upright(image) and "transparency" not in image.info
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything at all on damaged files
        raise _unfit(file, error) from error
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{printable(file)}: is {width}x{height}, over {MAX_PIXELS:,} pixels; convert the folder with --max-side"
        )
    return _Header(width, height, plain)


def _unfit(file: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(error, file)
    message = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{printable(file)}: does not decode as an image ({message}); repair or remove it")
