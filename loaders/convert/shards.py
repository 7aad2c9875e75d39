"""Which parquet files make up a split, by their names, and whether they are all there.

The layouts of the Hugging Face hub, of which a folder holds one:

    train-00000-of-00002.parquet                in the folder itself, or in its `data`
    plain_text/train-00000-of-00002.parquet     a folder a configuration
    default/train/0000.parquet                  a folder a configuration, and in it one a split
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, NamedTuple

from loaders.errors import DataError
from loaders.image_folder import SPLITS, unreadable
from loaders.names import printable

_MAX_DEPTH: Final = 3
# The hub once put a fingerprint behind the count.
_OF_N: Final = re.compile(r"(?P<name>.+)-(?P<index>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?\.parquet")
_NUMBERED: Final = re.compile(r"((?P<name>.+)[-.])?(?P<index>\d+)\.parquet")


class _Shard(NamedTuple):
    """A parquet file and what its path tells of it."""

    path: Path
    configuration: str
    """The folders between the source and the split, "" if there are none."""
    split: str
    """"" if nothing tells it."""
    series: str
    """What files of one split have in common before their numbers; "" if a folder tells the split."""
    number: int | None
    num_files: int | None
    """N of `-of-N`."""
    around_number: tuple[str, str]
    """The name of the file before and after its number."""

    def named(self, number: int) -> Path:
        """The path of another file of its series."""
        before, after = self.around_number
        num_digits = len(self.path.name) - len(before) - len(after)
        return self.path.with_name(f"{before}{number:0{num_digits}}{after}")


def find_parquet(folder: Path) -> list[Path]:
    """The parquet files of a folder, in one of the layouts above; none if it is laid out otherwise.

    Errors: OSError if a folder cannot be read.
    """
    for place in (folder, folder / "data"):
        if place.is_dir():
            found = [Path(entry) for entry in _listed(place) if _is_parquet(entry)]
            if found:
                return found
    found = []
    for entry in _below(folder, _MAX_DEPTH):
        if not _is_parquet(entry):
            return []  # other files in subfolders: an image folder
        found.append(Path(entry))
    return sorted(found)


def expand_pattern(pattern: str) -> list[Path]:
    """The paths that a pattern with `*`, `?` and `**` means, sorted.

    Errors: OSError if a folder cannot be read; `glob` would leave it out.
    """
    path = Path(pattern)
    found = [Path(path.anchor or ".")]
    for part in path.relative_to(path.anchor).parts:
        if part == "**":
            found = [folder for parent in found for folder in _folders(parent)]
        elif any(character in part for character in "*?["):
            found = [
                parent / entry.name
                for parent in found
                if parent.is_dir()
                for entry in _listed(parent)
                if fnmatch(entry.name, part)
            ]
        else:
            found = [parent / part for parent in found if _is_there(parent / part)]
    return sorted(set(found))


def select_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of one split; all of them, if no name tells a split and `split` is "train".

    Errors: DataError if there is no such split, if there are several configurations, or if a file is missing.
    """
    shards = [_shard(folder, path) for path in files]
    chosen = [shard for shard in shards if shard.split == split]
    if not chosen:
        told = sorted({shard.split for shard in shards if shard.split})
        usual = any(re.split(r"[-_.]", name)[0] in SPLITS for name in told)
        several = len(told) > 1 and any(shard.num_files is not None for shard in shards)
        if usual or several or split != "train":
            raise DataError(
                f"{printable(folder)}: has no parquet files of split {split!r}; "
                f"give one of {', '.join(map(printable, told))} with --split, or a pattern of names as the source"
            )
        chosen = shards
    configurations = sorted({shard.configuration for shard in chosen})
    if len(configurations) > 1:
        raise DataError(
            f"{printable(folder)}: holds several configurations; give the folder of one as the source: "
            f"{', '.join(printable(name or '.') for name in configurations)}"
        )
    _check_one_series(chosen, split)
    for missing in _missing(chosen):
        raise DataError(
            f"{printable(missing)}: is missing, which split {split!r} needs; fetch it, or the whole split again"
        )
    return [shard.path for shard in chosen]


def select_pattern(pattern: str) -> list[Path]:
    """The files of a pattern.

    Errors: DataError if there are none, or one is missing that the pattern means.
    """
    files = expand_pattern(pattern)
    if not files:
        raise DataError(f"{printable(pattern)}: no parquet files there")
    for missing in _missing(_shard(path.parent, path) for path in files):
        if fnmatch(missing.name, Path(pattern).name):
            raise DataError(f"{printable(missing)}: is missing; fetch it, or give a pattern without it")
    return files


def _shard(folder: Path, path: Path) -> _Shard:
    parents = list(path.relative_to(folder).parent.parts)
    if parents[:1] == ["data"]:
        del parents[0]
    of_n = _OF_N.fullmatch(path.name)
    found = of_n or _NUMBERED.fullmatch(path.name)
    series = (found["name"] or "") if found else path.stem
    # As `cifar10-train-00000-of-00001`; a split of the hub has no hyphen in its name.
    last = series.rpartition("-")[2]
    split = last if last in SPLITS else series
    if parents and (not series or (split not in SPLITS and parents[-1] in SPLITS)):
        split, series = parents.pop(), ""
    return _Shard(
        path=path,
        configuration="/".join(parents),
        split=split,
        series=series,
        number=int(found["index"]) if found else None,
        num_files=int(of_n["count"]) if of_n else None,
        around_number=(path.name[: found.start("index")], path.name[found.end("index") :])
        if found
        else ("", ""),
    )


def _check_one_series(chosen: list[_Shard], split: str) -> None:
    """Refuse what seems to be the same split twice, as `train.parquet` beside `train-00000-of-00002.parquet`."""
    first, seen = chosen[0], dict[int, Path]()
    for shard in chosen:
        others = (shard.series, shard.num_files) != (first.series, first.num_files)
        twice = (
            first.path if others and (shard.split == split or shard.num_files or first.num_files) else None
        )
        if shard.number is not None and shard.series == first.series:
            twice = twice or seen.get(shard.number)
            seen[shard.number] = shard.path
        if twice is not None:
            raise DataError(
                f"{printable(shard.path)}: seems to hold again what {printable(twice.name)} is a part of; remove one, "
                "or give a pattern of names as the source"
            )


def _missing(shards: Iterable[_Shard]) -> Iterator[Path]:
    """The files that the numbers of others tell of: all of `-of-N`; without it, none is left out in between."""
    groups = defaultdict[tuple[Path, str, int | None], dict[int, _Shard]](dict)
    for shard in shards:
        if shard.number is not None:
            groups[shard.path.parent, shard.series, shard.num_files][shard.number] = shard
    for (_, series, num_files), group in groups.items():
        first = min(group)
        known = group[first]
        wanted = range(num_files or 0)
        if num_files is None and known.split and not series:
            wanted = range(max(group) + 1)
        elif num_files is None and first <= 1:  # a larger first number may be a year
            wanted = range(first, max(group) + 1)
        yield from (known.named(number) for number in wanted if number not in group)


def _is_parquet(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".parquet") and not entry.is_dir()


def _listed(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _below(folder: Path | str, depth: int) -> Iterator[os.DirEntry[str]]:
    """The files in the folders below a folder, at most `depth` deep; not those in itself."""
    for child in _listed(folder):
        if child.is_dir():
            yield from (entry for entry in _listed(child.path) if not entry.is_dir())
            if depth > 1:
                yield from _below(child.path, depth - 1)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _folders(folder: Path) -> list[Path]:
    """A folder and all below it."""

    def refuse(error: OSError) -> None:
        raise unreadable(error, folder)

    return [Path(parent) for parent, _, _ in os.walk(folder, onerror=refuse)] if folder.is_dir() else []
