"""What a command left in its folder, in a form that two runs of it can be compared by, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_essl.checkpoint import load_file
from loaders import open_loader
from loaders.errors import DataError
from loaders.recipe import Recipe

TIMES = ("_s", "wait_share")
"""How the names of those metrics end that no two runs share."""


def run_result(run_dir: Path) -> dict[str, Any]:
    """Weights, optimizer, step, metrics without times, and evaluation of a run."""
    return {
        "checkpoint": tensors_digest(run_dir / "last.pt"),
        "backbone": tensors_digest(run_dir / "backbone.pt"),
        "metrics": _metrics(run_dir / "metrics.jsonl"),
        "evaluation": read_json(run_dir / "evaluation.json"),
    }


def tensors_digest(path: Path) -> str:
    """Of the tensors and numbers in a checkpoint, without its times; or why there is none."""
    if not path.exists():
        return "none"
    try:
        state = load_file(path)
    except DataError as error:
        return str(error)
    return digest({key: state[key] for key in ("method", "optimizer", "step", "backbone") if key in state})


def digest(value: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.contiguous().numpy().tobytes())
        else:
            hashed.update(repr(value).encode())

    add(value)
    return hashed.hexdigest()


def read_json(path: Path) -> Any:
    """The content of a file, or why there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return f"none: {type(error).__name__}"


def num_steps_logged(run_dir: Path) -> int:
    """How many lines of steps metrics.jsonl has."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"type": "step"') if path.exists() else 0


def file_names(folder: Path) -> list[str]:
    """All files below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_epoch(
    loader: str,
    path: Path,
    side: int,
    *,
    subset: np.ndarray | None = None,
    when_opened: Callable[[], object] | None = None,
    when_begun: Callable[[], object] | None = None,
) -> dict[Any, Any]:
    """Read an epoch: the whole images and a random crop of each.

    Args: `side` of the images; the two callables come between opening and epoch, and after the first batch.
    Returns: digest of the crops and label, by sample; and the class names and counts.
    Errors: as the loader.
    """
    # The centre crop of the image's own size changes no pixel, so that no flipped bit is cut off or rounded away.
    recipes = (Recipe(size=side, crop="center"), Recipe(size=16))
    opened = open_loader(
        loader, path, recipes, batch_size=16, seed=3, drop_last=False, num_workers=1, subset=subset
    )
    manifest = opened.manifest
    found: dict[Any, Any] = {"classes": (manifest.class_names, manifest.class_counts)}
    if when_opened is not None:
        when_opened()
    with contextlib.closing(opened), contextlib.closing(opened.epoch(0)) as batches:
        for number, batch in enumerate(batches):
            if number == 0 and when_begun is not None:
                when_begun()
            for n, index in enumerate(batch.indices.tolist()):
                hashed = hashlib.blake2b(digest_size=16)
                for crop in batch.images:
                    hashed.update(crop[n].contiguous().numpy())
                found[index] = (hashed.digest(), int(batch.labels[n]))
    return found


def _metrics(path: Path) -> Any:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        return f"none: {type(error).__name__}"
    return [{name: value for name, value in line.items() if not name.endswith(TIMES)} for line in lines]
