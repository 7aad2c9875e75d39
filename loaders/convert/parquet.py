"""Parquet files as the Hugging Face hub lays them out: a column of encoded images, one of integer labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loaders.convert.source import Sample, Source
from loaders.errors import DataError

_IMAGE_COLUMNS: Final = ("image", "img")
_LABEL_COLUMN: Final = "label"
_SPLITS: Final = frozenset({"train", "test", "validation", "valid", "val"})
_BATCH_ROWS: Final = 64
_READ_BYTES: Final = 1 << 20


def open_parquet(files: list[Path], description: str) -> Source:
    """The images of parquet files, row after row.

    The columns: `image` or `img`, a struct with `bytes` (or the bytes themselves), and an integer `label`.
    Class names come from the metadata that the `datasets` library writes into the schema; without them, the
    labels are the names.

    Errors: DataError if a file cannot be read, a column is missing or of another type, or a label is missing
    or negative.
    """
    if not files:
        raise DataError(f"{description}: no parquet files there")
    num_samples, largest, names = 0, -1, None
    image_columns = []
    for path in files:
        with _readable(path), pq.ParquetFile(path) as file:
            image_columns.append(_image_column(path, file.schema_arrow))
            names = names or _class_names(file.schema_arrow)
            num_samples += file.metadata.num_rows
            for batch in file.iter_batches(columns=[_LABEL_COLUMN]):
                labels = batch.column(0)
                if labels.null_count or (len(labels) and pc.min(labels).as_py() < 0):
                    raise DataError(f"{path}: a label is missing or negative; give a labelled split")
                largest = max(largest, pc.max(labels).as_py() if len(labels) else -1)
    class_names = names or tuple(str(label) for label in range(largest + 1))
    if largest >= len(class_names):
        raise DataError(
            f"{description}: label {largest} has no name: the schema's metadata has {len(class_names)}"
        )

    def samples() -> Iterator[Sample]:
        for path, column in zip(files, image_columns, strict=True):
            yield from _rows(path, column)

    return Source(description=description, class_names=class_names, num_samples=num_samples, samples=samples)


def select_split(files: list[Path], split: str) -> list[Path]:
    """The files whose names begin with `split`, as `train-00000-of-00002.parquet`.

    All of them, if no name begins with a split.

    Errors: DataError if there are files of other splits only.
    """
    found = {path: re.split(r"[-_.]", path.name)[0] for path in files}
    others = sorted(set(found.values()) & _SPLITS - {split})
    chosen = [path for path, name in found.items() if name == split]
    if others and not chosen:
        raise DataError(
            f"{files[0].parent}: has no parquet files of split {split!r}; "
            f"give one of {', '.join(others)} with --split"
        )
    return chosen or files


def _rows(path: Path, column: str) -> Iterator[Sample]:
    row = 0
    # With a buffer the reader streams a column; without, it holds the whole row group, 100 MB and more at the
    # hub.
    with _readable(path), pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column, _LABEL_COLUMN]):
            images = batch.column(batch.schema.get_field_index(column))
            if pa.types.is_struct(images.type):
                images = images.field("bytes") if images.null_count == 0 else pc.struct_field(images, "bytes")
            labels = batch.column(batch.schema.get_field_index(_LABEL_COLUMN))
            for image, label in zip(images, labels, strict=True):
                yield Sample(f"{path}: row {row}", label.as_py(), image.as_py() or b"")
                row += 1


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again"
        ) from error


def _image_column(path: Path, schema: pa.Schema) -> str:
    columns = [name for name in _IMAGE_COLUMNS if name in schema.names]
    if not columns or _LABEL_COLUMN not in schema.names:
        raise DataError(
            f"{path}: needs the columns `image` or `img`, and `label`; it has {', '.join(schema.names)}"
        )
    kind = schema.field(columns[0]).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if "bytes" in [field.name for field in kind] else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{path}: column `{columns[0]}` is {schema.field(columns[0]).type}, not a struct with `bytes`"
        )
    if not pa.types.is_integer(schema.field(_LABEL_COLUMN).type):
        raise DataError(
            f"{path}: column `{_LABEL_COLUMN}` is {schema.field(_LABEL_COLUMN).type}, not an integer"
        )
    return columns[0]


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """The names in the `huggingface` entry of the schema's metadata, if there are any."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return None
    for key in ("info", "features", _LABEL_COLUMN, "names"):
        info = info.get(key) if isinstance(info, dict) else None
    return tuple(map(str, info)) if info else None
