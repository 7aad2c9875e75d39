"""Checkpoints: one file that holds all a resume needs, written so that a crash never leaves half of one."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fast_essl.config import ConfigError, RunConfig
from fast_essl.config_io import config_to_table, flatten
from loaders.errors import DataError

FORMAT_VERSION = 2
RUN_ONLY_FIELDS = frozenset(
    {
        "data.file",  # the dataset is compared by its digest, so a moved file is the same one
        "data.test",
        "data.train",
        "data.num_workers",
        "head.layer_norm",
        "method.contrastive_backend",
        "train.max_steps",
        "train.device",
        "train.num_threads",
        "train.compile",
        "train.log_every",
        "train.knn_every",
        "train.checkpoint_every",
    }
)
"""The configuration fields that may change when a run is resumed, as those of the evaluations; others define it."""
OTHER_SECTIONS = ("probe.", "finetune.", "speedrun.", "study.", "cells.", "solver.", "counts.")
"""Of evaluations; of how a file of unit cells was made, which is compared by its digest, too."""


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file of tensors and plain values under its name only when it is whole and on the disk.

    Errors: `OSError`, with the file of before untouched and nothing left behind.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_file(path: Path) -> dict[str, Any]:
    """Read a file of `save_file` onto the CPU, running no code from it.

    Errors: `DataError` when it is damaged or not a checkpoint; `OSError` when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                damaged_part = archive.testzip()  # torch.load does not look at the checksums
            if damaged_part is not None:
                raise zipfile.BadZipFile(damaged_part)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise DataError(f"{path}: damaged, or not a checkpoint; remove it to start the run anew") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: not a checkpoint of this version of fast_essl; remove it to start anew")
    return state


def save_checkpoint(path: Path, *, config: RunConfig, dataset_digest: str, **state: Any) -> None:
    """Write a checkpoint: the given state, the configuration and the dataset it belongs to."""
    identity = {
        "format_version": FORMAT_VERSION,
        "config": config_to_table(config),
        "dataset_digest": dataset_digest,
    }
    save_file(path, {**identity, **state})


def load_checkpoint(path: Path, *, config: RunConfig, dataset_digest: str) -> dict[str, Any]:
    """Read a checkpoint, provided that it is of this configuration and dataset.

    Errors: `ConfigError` naming the first fields that differ, `DataError` naming the dataset or the damaged file.
    """
    state = load_file(path)
    saved, now = flatten(state["config"]), flatten(config_to_table(config))
    differing = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    differing = [
        key for key in differing if key not in RUN_ONLY_FIELDS and not key.startswith(OTHER_SECTIONS)
    ]
    if differing:
        shown = ", ".join(
            f"{key} = {saved.get(key)!r} there and {now.get(key)!r} now" for key in differing[:3]
        )
        more = f" and {len(differing) - 3} fields more" if len(differing) > 3 else ""
        raise ConfigError(f"{path}: a run of another configuration: {shown}{more}; choose another --run-dir")
    if state["dataset_digest"] != dataset_digest:
        data = now.get("data.train", now.get("data.file"))
        raise DataError(
            f"{path}: a run on other images than {data} holds now "
            f"(digest {state['dataset_digest'][:12]} there, {dataset_digest[:12]} now); choose another --run-dir"
        )
    return state
