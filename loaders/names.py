"""Names of files and classes, which may hold anything, in messages and manifests, which are UTF-8."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from loaders.errors import DataError

MAX_NAME_CHARACTERS: Final = 1000
MAX_CLASSES: Final = 1_000_000


# Control characters, line ends, and what is no character: half of a surrogate pair, or a byte that is not UTF-8.
_UNFIT: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(name: object) -> str:
    r"""A name in one line of UTF-8: bytes of no UTF-8 as `\xff`, control characters as `\n`."""
    return _UNFIT.sub(_escape, str(name))


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte of a file's name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def check_class_names(names: Iterable[str], where: str) -> None:
    """Refuse class names that a manifest, a table or a message could not show.

    Errors: DataError naming `where` and the class whose name is not UTF-8, holds control characters or is longer
    than 1,000 characters; or if there are more than a million.
    """
    for number, name in enumerate(names):
        if number == MAX_CLASSES:
            raise DataError(f"{where}: has more than {MAX_CLASSES:,} classes")
        if len(name) > MAX_NAME_CHARACTERS:
            raise DataError(
                f"{where}: the name of class {number} has {len(name):,} characters "
                f"({printable(name[:40])}...), over {MAX_NAME_CHARACTERS:,}; shorten it"
            )
        if _UNFIT.search(name):
            raise DataError(
                f"{where}: the name of class {number}, '{printable(name)}', is not UTF-8 or holds control "
                "characters; rename it"
            )
