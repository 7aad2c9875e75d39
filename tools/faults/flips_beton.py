"""Single-bit flips in `.beton` files and in what lies beside them, read by the loaders and by `convert --verify`."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import shutil
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import children
import data
import numpy as np
from children import Outcome
from results import read_epoch
from tally import Injection, judge

from fast_essl.config import ConfigError
from loaders.errors import DataError

NUM_FLIPS = 400
NUM_BESIDE = 40
"""Flips in the manifest and other files beside a `.beton` file."""
FLIPS_A_SERIES = 10
"""Read by one process in turn, so that FFCV's many seconds of compilation are paid for once."""
LOADERS = {
    "raw": ("device", "torch"),
    "photographs": ("torch",),
    "one block": ("device", "torch"),
}
SERIES_OF_FFCV = 10
"""Each so many series are read by FFCV."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One bit."""

    file_name: str
    offset: int
    bit: int
    moment: str
    """before the file is opened, once it is opened, or after the epoch's first batch"""
    sample: int | None
    """The sample whose image bytes it lies in; None in tables, gaps and other files."""

    def do(self, folder: Path) -> None:
        """Flip the bit; the second time it is as it was."""
        with open(folder / self.file_name, "r+b") as file:
            file.seek(self.offset)
            byte = file.read(1)[0]
            file.seek(self.offset)
            file.write(bytes([byte ^ 1 << self.bit]))


@dataclass(frozen=True, kw_only=True)
class Series:
    """Flips of one file that one process reads in turn."""

    name: str
    loader: str
    flips: list[Flip]
    first: int
    """Number of the first flip, for its seed."""


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Flip bits of each of `data.BETON_FILES`."""
    references: dict[tuple[str, str], dict[Any, Any]] = {}
    series: list[Series] = []
    for name in data.BETON_FILES:
        path = data.make_beton(name, folder, share)
        of_file = _series(name, path, share, random.Random(f"{seed} {name}"))
        for loader in sorted({one.loader for one in of_file}):
            outcome = children.run(
                partial(read_epoch, loader, path, data.BETON_FILES[name].side), folder=folder, limit_s=180
            )
            if outcome.code:
                raise RuntimeError(f"{path}: {loader} does not read it whole: {outcome.stderr}")
            references[name, loader] = outcome.value
        series += of_file
    random.Random(seed).shuffle(series)  # so that FFCV's are dealt to all processes
    work = partial(_read_series, source=folder, references=references)
    return [injection for found in in_parallel(series, work) for injection in found]


def _series(name: str, path: Path, share: float, chance: random.Random) -> list[Series]:
    flips = [_flip_inside(path, chance) for _ in range(max(4, round(NUM_FLIPS * share)))]
    beside = [other for other in path.parent.glob(f"{path.name}*") if other.is_file() and other != path]
    for _ in range(max(2, round(NUM_BESIDE * share))):
        other = chance.choice(beside)
        flips.append(
            Flip(
                file_name=other.name,
                offset=chance.randrange(other.stat().st_size),
                bit=chance.randrange(8),
                moment="before",
                sample=None,
            )
        )
    chance.shuffle(flips)
    found = []
    for first in range(0, len(flips), FLIPS_A_SERIES):
        number = first // FLIPS_A_SERIES
        others = LOADERS[name]
        loader = "ffcv" if number % SERIES_OF_FFCV == SERIES_OF_FFCV // 2 else others[number % len(others)]
        found.append(
            Series(name=name, loader=loader, flips=flips[first : first + FLIPS_A_SERIES], first=first)
        )
    return found


def _flip_inside(path: Path, chance: random.Random) -> Flip:
    """Three quarters anywhere in the file, which is nearly always in an image, the others in its tables."""
    with open(path, "rb") as file:
        # FFCV's header: version, fields, page size, samples, where the table of (sample, offset, size) begins.
        _, _, _, num_samples, table_start = struct.unpack("<HHIQQ", file.read(24))
        file.seek(table_start)
        rows = np.frombuffer(file.read(24 * num_samples), "<u8").reshape(-1, 3)
    num_bytes = path.stat().st_size
    first_image = int(rows[:, 1].min())
    region = chance.choice([(0, num_bytes)] * 6 + [(0, first_image), (table_start, num_bytes)])
    offset = chance.randrange(*region)
    hit = rows[(rows[:, 1] <= offset) & (offset < rows[:, 1] + rows[:, 2])]
    return Flip(
        file_name=path.name,
        offset=offset,
        bit=chance.randrange(8),
        moment=chance.choices(["before", "opened", "begun"], [70, 15, 15])[0],
        sample=int(hit[0, 0]) if len(hit) else None,
    )


def _read_series(
    series: Series, folder: Path, *, source: Path, references: dict[tuple[str, str], dict[Any, Any]]
) -> list[Injection]:
    """All flips of a series, in as many processes as it takes when some of them crash."""
    beton = f"{series.name.replace(' ', '-')}.beton"
    for path in source.glob(f"{beton}*"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    reference = references[series.name, series.loader]
    side = data.BETON_FILES[series.name].side
    answers, done = folder / "answers", 0
    found: list[Injection] = []
    while done < len(series.flips):
        answers.unlink(missing_ok=True)
        rest = series.flips[done:]
        action = partial(
            _read_all,
            rest,
            series.loader,
            folder / beton,
            side,
            len(reference) - 1,
            series.first + done,
            answers,
        )
        ended = children.run(action, folder=folder, limit_s=180 + 20 * len(rest))
        for flip, (read, verified) in zip(rest, _pickles(answers), strict=False):
            found += _judged(series, flip, read, verified, reference, folder)
            done += 1
        if done < len(series.flips) and (ended.code or ended.hung):
            flip = series.flips[done]
            if _is_flipped(flip, folder):
                flip.do(folder)  # the process ended before it could
            verdict, detail = judge(ended, [], same=False)
            found.append(
                Injection(
                    kind=f"flip: {series.name}",
                    fault=_described(series, flip),
                    verdict=verdict,
                    detail=detail,
                )
            )
            done += 1
    return found


def _read_all(
    flips: list[Flip], loader: str, path: Path, side: int, num_samples: int, first: int, answers: Path
) -> None:
    with open(answers, "ab") as file:
        for number, flip in enumerate(flips, first):
            flip_now = partial(flip.do, path.parent)
            if flip.moment == "before":
                flip_now()
            read = partial(
                read_epoch,
                loader,
                path,
                side,
                subset=_subset(flip, num_samples, number),
                when_opened=flip_now if flip.moment == "opened" else None,
                when_begun=flip_now if flip.moment == "begun" else None,
            )
            outcome = _outcome(read)
            if flip.moment != "before" and outcome.value is None and not _is_flipped(flip, path.parent):
                flip_now()
            verified = _outcome(children.command("convert", "--verify", path))
            flip_now()
            pickle.dump((outcome, verified), file)
            file.flush()


def _is_flipped(flip: Flip, folder: Path) -> bool:
    """Whether reading came as far as the flip; told by the byte, which the parent's file still has as it was."""
    with open(folder.parent / flip.file_name, "rb") as whole, open(folder / flip.file_name, "rb") as file:
        whole.seek(flip.offset)
        file.seek(flip.offset)
        return whole.read(1) != file.read(1)


def _subset(flip: Flip, num_samples: int, number: int) -> np.ndarray | None:
    """The samples to read: all of them now and then, else the one that is hit and some others."""
    if number % (3 if num_samples <= data.BETON_FILES["one block"].num_images else 20) == 0:
        return None
    chosen = set(random.Random(number).sample(range(num_samples), 30))
    if flip.sample is not None:
        chosen |= {flip.sample, max(flip.sample - 1, 0), min(flip.sample + 1, num_samples - 1)}
    return np.array(sorted(chosen))


def _outcome(action: Callable[[], Any]) -> Outcome:
    """As of a child that ran the action alone."""
    errors = io.StringIO()
    code, value = 1, None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            value = action()
            code = 0
        except (ConfigError, DataError) as error:
            code = 2
            errors.write(f"fast-essl: error: {' '.join(str(error).split())}\n")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:
            traceback.print_exc(file=errors)
    return Outcome(code=code, stderr=errors.getvalue(), value=value, hung=False)


def _judged(
    series: Series, flip: Flip, read: Outcome, verified: Outcome, reference: dict[Any, Any], folder: Path
) -> list[Injection]:
    names = [folder / flip.file_name, folder / f"{series.name.replace(' ', '-')}.beton"]
    same = read.value is not None and all(reference.get(key) == value for key, value in read.value.items())
    same = same and (flip.sample is None or flip.sample in read.value)
    in_images = flip.file_name.endswith(".beton")
    kind = f"flip: {series.name}" if in_images else "flip: manifest"
    verdict, detail = judge(read, names, same=same)
    fault = _described(series, flip)
    # In the file itself any flipped bit is one too many; what a manifest says of its origin may change nothing.
    verify_verdict, verify_detail = judge(verified, names, same=same and not in_images)
    return [
        Injection(kind=kind, fault=fault, verdict=verdict, detail=detail),
        Injection(kind=f"{kind}, --verify", fault=fault, verdict=verify_verdict, detail=verify_detail),
    ]


def _described(series: Series, flip: Flip) -> str:
    where = "outside images" if flip.sample is None else f"sample {flip.sample}"
    return f"{flip.file_name}: byte {flip.offset} bit {flip.bit} ({where}), {flip.moment}, loader {series.loader}"


def _pickles(path: Path) -> list[Any]:
    found: list[Any] = []
    if path.exists():
        with open(path, "rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                found.append(pickle.load(file))
    return found
