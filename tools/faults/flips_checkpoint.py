"""Single-bit flips in a run's checkpoint and backbone, read by all that reads them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import children
import data
import torch
from results import digest, run_result, tensors_digest
from tally import Injection, judge

NUM_FLIPS = 1000
FIRST_STEPS, STEPS = 2, 3
OPTIONS = ("--train.knn-every", "0")
READERS = {"resume": 5, "evaluate": 2, "init-from": 2, "export": 1}
"""Who reads the flipped file, and how often of ten times."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One bit of a file, and who reads it."""

    reader: str
    file_name: str
    offset: int
    bit: int


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Flip bits of a checkpoint that a run is resumed from, evaluated by, started from, or exported from."""
    data.make_training_data(folder)
    config = data.make_config(folder, "e_simclr", 8)
    run_dir = folder / "run"
    made = children.run(
        _reading("pretrain", config, run_dir, run_dir / "last.pt", FIRST_STEPS), folder=folder
    )
    if made.code:
        raise RuntimeError(f"the run to resume: {made.stderr}")
    references = {}
    for reader in READERS:
        whole = folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(run_dir, whole)
        outcome = children.run(_reading(reader, config, whole, whole / "last.pt", STEPS), folder=folder)
        if outcome.code:
            raise RuntimeError(f"{reader}: {outcome.stderr}")
        references[reader] = outcome.value
    chance = random.Random(f"{seed} checkpoint")
    flips = [_flip(run_dir, chance) for _ in range(max(8, round(NUM_FLIPS * share)))]
    return in_parallel(flips, partial(_inject, run_dir=run_dir, config=config, references=references))


def _flip(run_dir: Path, chance: random.Random) -> Flip:
    (reader,) = chance.choices(list(READERS), list(READERS.values()))
    file_name = chance.choice(["last.pt", "backbone.pt"]) if reader == "init-from" else "last.pt"
    path = run_dir / file_name
    return Flip(reader=reader, file_name=file_name, offset=_offset(path, chance), bit=chance.randrange(8))


def _offset(path: Path, chance: random.Random) -> int:
    """Half anywhere, the rest where a zip's checksums do not reach: its directory, and the attributes in it."""
    content = path.read_bytes()
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02", content)]
    region = chance.choices(["anywhere", "directory", "attributes"], [50, 35, 15])[0]
    if region == "anywhere" or not entries:
        return chance.randrange(len(content))
    if region == "directory":
        return chance.randrange(entries[0], len(content))
    return chance.choice(entries) + chance.randrange(38, 42)


def _inject(
    flip: Flip, folder: Path, *, run_dir: Path, config: Path, references: dict[str, Any]
) -> Injection:
    copy = folder / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    path = copy / flip.file_name
    content = bytearray(path.read_bytes())
    content[flip.offset] ^= 1 << flip.bit
    path.write_bytes(content)
    outcome = children.run(_reading(flip.reader, config, copy, path, STEPS), folder=folder)
    same = outcome.code == 0 and outcome.value == references[flip.reader]
    verdict, detail = judge(outcome, [path], same=same)
    fault = f"{flip.file_name}: byte {flip.offset} bit {flip.bit}"
    return Injection(kind=f"flip: checkpoint, {flip.reader}", fault=fault, verdict=verdict, detail=detail)


def _reading(reader: str, config: Path, run_dir: Path, file: Path, num_steps: int) -> Callable[[], Any]:
    if reader == "evaluate":
        return children.command("evaluate", run_dir, result=partial(_accuracies, run_dir))
    if reader == "export":
        out = run_dir / "exported.pth"
        return children.command("export", run_dir, out, result=partial(_exported, out))
    pretrain = ("pretrain", config, *OPTIONS, "--train.max-steps")
    if reader == "init-from":
        started = run_dir / "started"
        more = ("1", "--run-dir", started, "--train.init-from", file)
        return children.command(*pretrain, *more, result=partial(tensors_digest, started / "last.pt"))
    return children.command(*pretrain, num_steps, "--run-dir", run_dir, result=partial(run_result, run_dir))


def _accuracies(run_dir: Path) -> Any:
    return json.loads((run_dir / "evaluation.json").read_text())["accuracy"]


def _exported(path: Path) -> str:
    return digest(torch.load(path, weights_only=True))
