"""The name that was meant by one that is not there: of a command, an option, a field of a configuration, a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.6
"""Likeness from which on a name is worth proposing where a proposal may be left out."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The name most like `word`, the first of several that are."""
    return max(names, key=lambda name: likeness(word, name))


def proposal(word: str, names: Iterable[str]) -> str:
    """`; the nearest is NAME` to end a message with, or nothing where no name is alike."""
    found = nearest(word, names)
    return f"; the nearest is {found}" if likeness(word, found) >= ALIKE else ""


def likeness(word: str, name: str) -> float:
    """From 0, not alike, to 1. Upper case, underscores for hyphens and hyphens in front make no difference.

    A name may have parts, as `optimizer.base-learning-rate` and `bench plan`. A word without parts is compared with the
    last of them as well; one with parts may be right in the last and wrong in the first.
    """
    word, name = _plain(word), _plain(name)
    whole = _ratio(word, name)
    last = _likeness_of_part(word.rpartition(".")[2], name.rpartition(".")[2])
    return (whole + last) / 2 if "." in word else max(whole, last)


def _likeness_of_part(word: str, part: str) -> float:
    """The initials of a part's words, or of some that follow each other, stand for it: `lr` is base-learning-rate."""
    initials = "".join(piece[:1] for piece in part.split("-"))
    if len(word) >= 2 and word in initials:
        return 0.95 if initials.endswith(word) else 0.8
    return _ratio(word, part)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("_", "-").replace(" ", ".")
