"""Data that a command makes where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loaders.convert import convert
from loaders.errors import DataError
from loaders.manifest import check_opening


def convert_where_needed(source: str, split: str, path: Path, say: Callable[[str], None]) -> bool:
    """Make a `.beton` file from a source, unless a whole one is there; returns whether it was made.

    Args: `source` and `split` as `convert` takes them.
    Errors: as `convert`.
    """
    if path.exists():
        try:
            manifest = check_opening(path)
        except DataError as error:
            say(f"{split}: made anew, since {error}")
        else:
            say(f"{split}: {path}, {manifest.num_samples} images, there already")
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = convert(source, path, split=split, overwrite=True, progress=False)
    say(f"{split}: {path}, {manifest.num_samples} images converted")
    return True
