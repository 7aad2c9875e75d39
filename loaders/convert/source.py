"""What every source of images gives to the conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.names import check_class_names


class Sample(NamedTuple):
    """One image as it stands in its source."""

    name: str
    """What an error calls it: a path, or a file and the row in it."""
    label: int
    image: Path | bytes | npt.NDArray[np.uint8]
    """A file, the bytes of one, or pixels (H, W, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of labelled images that is read as a stream.

    Errors: DataError if a class name cannot stand in a manifest.
    """

    description: str
    class_names: tuple[str, ...]
    num_samples: int
    samples: Callable[[], Iterator[Sample]]
    """Starts the stream; always the same samples in the same order."""

    def __post_init__(self) -> None:
        check_class_names(self.class_names, self.description)
