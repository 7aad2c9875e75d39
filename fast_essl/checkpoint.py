"""Checkpoints: one file that holds all a resume needs, written so that a crash never leaves half of one."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_essl import records
from fast_essl.config import ConfigError, RunConfig
from fast_essl.config_io import config_to_table, flatten
from fast_essl.distributed import rank
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


CHECKPOINT_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "dataset_digest": str,
    "step": int,
    "evaluated_step": int,
    "elapsed_s": (int, float),
    "metrics_num_bytes": int,
    "method": dict,
    "optimizer": dict,
    "scaler": dict,
}
"""What a checkpoint holds beside its format's version."""
DIGEST_MARK = b"fast_essl sha256 "
"""What the zip archive's comment begins with; the SHA-256 of all bytes before it follows, in hexadecimal."""
FOLDER_ATTRIBUTE = 0x10
"""Of a part of a zip archive, in its directory."""
_NUM_DIGITS = 64
_END_OF_ZIP, _NUM_END_BYTES = b"PK\x05\x06", 22


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file of tensors and plain values under its name only when it is whole and on the disk.

    Errors: as `records.write_bytes`, with the file of before untouched and nothing left behind.
    """
    records.write_bytes(path, *encode(state))


def encode(state: Mapping[str, Any]) -> tuple[memoryview, bytes]:
    """What `torch.save` writes, in two parts: `torch.load` reads them as one file, `decode` checks its digest, too.

    The digest covers the whole file and is the comment of the zip archive: its own checksums do not cover its
    directory, where one bit turns a tensor into uninitialised memory.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    # The archive ends with the length of its comment, of which torch writes none.
    archive = buffer.getbuffer()[:-2]
    mark = (len(DIGEST_MARK) + _NUM_DIGITS).to_bytes(2, "little") + DIGEST_MARK
    digest = hashlib.sha256(archive)
    digest.update(mark)
    return archive, mark + digest.hexdigest().encode()


def decode(content: bytes) -> Any:
    """What was saved with `encode`, or by `torch.save`, onto the CPU; runs no code from it.

    Nothing of a file with a digest is read before the digest is right; of one without, as version 0.1.0 and others
    write them, the checksums of the parts and the directory are checked.

    Errors: of nearly any kind when it is damaged.
    """
    if content.startswith(b"PK") and not _has_right_digest(content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged_part = archive.testzip()  # torch.load does not look at the checksums
            # Torch takes a part that is marked as a folder for empty, and leaves the tensor's memory as it is.
            marked = any(
                part.external_attr & FOLDER_ATTRIBUTE or part.is_dir() for part in archive.infolist()
            )
        if damaged_part is not None or marked:
            raise zipfile.BadZipFile(damaged_part)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def has_digest(content: bytes) -> bool:
    """Whether a file was saved with `encode`."""
    return content[-_NUM_DIGITS - len(DIGEST_MARK) : -_NUM_DIGITS] == DIGEST_MARK


def _has_right_digest(content: bytes) -> bool:
    """False for a file without one. Errors: `BadZipFile`."""
    if has_digest(content):
        digest = hashlib.sha256(memoryview(content)[:-_NUM_DIGITS]).hexdigest().encode()
        if content[-_NUM_DIGITS:] != digest:
            raise zipfile.BadZipFile("the digest is another one")
        return True
    # An archive without a comment ends with its last record; otherwise it had a comment, and damage has hit that.
    if content[-_NUM_END_BYTES:][:4] != _END_OF_ZIP or content[-2:] != b"\0\0":
        raise zipfile.BadZipFile("the digest is damaged")
    return False


def load_file(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a file of `save_file` onto the CPU, running no code from it.

    Args: `kinds` of the entries that have to be there.
    Errors: `DataError` when it is damaged or not such a file; `OSError` when it cannot be read.
    """
    content = records.read_bytes(path)
    try:
        state = decode(content)
    except MemoryError:
        raise
    except Exception:  # damage takes the decoders to nearly any: IndexError, AssertionError, zlib.error, …
        raise DataError(f"{path}: damaged, or not a checkpoint; remove it to start the run anew") from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: not a checkpoint of this version of fast_essl; remove it to start anew")
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            what = f"is of type {type(state[name]).__name__}" if name in state else "is missing"
            raise DataError(f"{path}: not a whole checkpoint: {name} {what}; remove it to start the run anew")
    remark_without_digest(content, path)
    return state


def remark_without_digest(content: bytes, path: Path) -> None:
    """Say once that a checkpoint of fast_essl is of a version whose files could not be checked as a whole."""
    if not has_digest(content) and rank() == 0:
        records.remark(
            f"{path}: written by version 0.1.0, without a digest; its parts were checked instead of the whole"
        )


def weights_digest(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256 of tensors, on any device: their names without the prefix, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(prefix)):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name.removeprefix(prefix)} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    state = load_file(path, **CHECKPOINT_KINDS)
    if min(state[name] for name in ("step", "evaluated_step", "elapsed_s", "metrics_num_bytes")) < 0:
        raise DataError(
            f"{path}: not a checkpoint: a count in it is negative; remove it to start the run anew"
        )
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
