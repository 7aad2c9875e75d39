"""Images by sample index, as Pillow decodes them: from a `.beton` file, or straight from an image folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from loaders.beton import IMAGE_JPEG, BetonTables, read_tables
from loaders.errors import DataError
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
from loaders.manifest import Manifest, check_opening
from loaders.names import printable

_PLAIN: Final = {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P")}
"""Formats and modes, as Pillow names them, that DALI decodes to the same pixels."""


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
            with quiet_pillow(None):  # the size was checked when it was converted
                return Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise undecodable(self.path, index) from error


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
