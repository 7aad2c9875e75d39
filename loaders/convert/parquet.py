"""Parquet files as the Hugging Face hub lays them out: a column of encoded images, one of integer labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loaders.convert.source import Sample, Source
from loaders.errors import DataError
from loaders.names import MAX_CLASSES, printable

_IMAGE_COLUMNS: Final = ("image", "img")
_LABEL_COLUMN: Final = "label"
_BATCH_ROWS: Final = 64
_READ_BYTES: Final = 1 << 20
# Encoded images hardly become smaller. What unpacks to more than this, and by so much, is no column of them.
_UNPACKED_BYTES: Final = 1 << 30
_UNPACKED_RATIO: Final = 100


def open_parquet(files: list[Path], description: str) -> Source:
    """The images of parquet files, row after row.

    The columns: `image` or `img`, a struct with `bytes` (or the bytes themselves), and an integer `label`. Where an
    image has a `path` and no bytes, the file of that name below the parquet file's folder is read.
    Class names come from the metadata that the `datasets` library writes into the schema; without them, the
    labels are the names.

    Errors: DataError if a file cannot be read, claims more than it can hold, has other class names than the first,
    or a column is missing or of another type, or a label is missing or negative.
    """
    largest, names = -1, None
    tables: list[_Table] = []
    for path in files:
        with _readable(path), pq.ParquetFile(path) as file:
            _check_sizes(path, file.metadata)
            table = _Table(path, _image_column(path, file.schema_arrow), file.metadata.num_rows)
            found = _class_names(path, file.schema_arrow)
            if tables and found != names:
                raise DataError(
                    f"{printable(path)}: its class names are not those of {printable(tables[0].path)} "
                    f"({_difference(names, found)}), so a label means two classes; convert them one by one"
                )
            names = found
            largest = max(largest, _largest_label(path, file))
            tables.append(table)
    if names is None and largest >= MAX_CLASSES:
        raise DataError(
            f"{description}: label {largest} has no name, and over {MAX_CLASSES:,} classes are too many"
        )
    class_names = names or tuple(str(label) for label in range(largest + 1))
    if largest >= len(class_names):
        raise DataError(
            f"{description}: label {largest} has no name: the schema's metadata has {len(class_names)}"
        )

    def samples() -> Iterator[Sample]:
        for table in tables:
            yield from _rows(table)

    num_samples = sum(table.num_rows for table in tables)
    return Source(description=description, class_names=class_names, num_samples=num_samples, samples=samples)


class _Table(NamedTuple):
    path: Path
    image_column: str
    num_rows: int


def _rows(table: _Table) -> Iterator[Sample]:
    path, column, num_rows = table
    row = 0
    # With a buffer the reader streams a column; without, it holds the whole row group, 100 MB and more at the
    # hub.
    with _readable(path), pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column, _LABEL_COLUMN]):
            images = batch.column(batch.schema.get_field_index(column))
            contents, paths = images, [None] * len(images)
            if pa.types.is_struct(images.type):
                contents, paths = (_child(images, name).to_pylist() for name in ("bytes", "path"))
            else:
                contents = images.to_pylist()
            labels = batch.column(batch.schema.get_field_index(_LABEL_COLUMN))
            for content, beside, label in zip(contents, paths, labels, strict=True):
                name = f"{printable(path)}: row {row}"
                if content is None and beside is not None:
                    yield Sample(name, label.as_py(), _file_beside(path, beside, name))
                else:
                    yield Sample(name, label.as_py(), content or b"")
                row += 1
    if row != num_rows:
        raise DataError(f"{printable(path)}: had {num_rows} rows at first and {row} now; convert again")


def _child(images: pa.StructArray, name: str) -> pa.Array:
    if images.type.get_field_index(name) < 0:
        return pa.nulls(len(images))
    return pc.struct_field(images, name)


def _file_beside(path: Path, name: str, row: str) -> Path:
    """The file that a row names, which must stand below the parquet file's folder: what names it is not trusted."""
    file = path.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
        raise DataError(
            f"{row}: has no bytes, and its path {printable(name)[:200]} is no file below {printable(path.parent)}; "
            "bring the image files, or a parquet file that holds their bytes"
        )
    return file


def _check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse metadata that claims more than a file of this size can hold, before memory is asked for."""
    num_bytes = path.stat().st_size
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    claim = ""
    if num_rows != metadata.num_rows or any(group.num_rows < 0 for group in groups):
        claim = f"{metadata.num_rows:,} rows where its row groups have {num_rows:,}"
    elif num_rows > num_bytes:
        claim = f"{num_rows:,} images"
    for group in groups:
        for column in map(group.column, range(group.num_columns)):
            stored, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if not 0 <= stored <= num_bytes:
                claim = f"{stored:,} bytes in column {column.path_in_schema}"
            elif unpacked < 0 or (unpacked > _UNPACKED_BYTES and unpacked > _UNPACKED_RATIO * stored):
                claim = f"{unpacked:,} bytes in column {column.path_in_schema}, unpacked from {stored:,}"
    if claim:
        raise DataError(
            f"{printable(path)}: is damaged: it claims {claim} in a file of {num_bytes:,} bytes; fetch it again"
        )


def _largest_label(path: Path, file: pq.ParquetFile) -> int:
    largest, num_rows = -1, 0
    for batch in file.iter_batches(columns=[_LABEL_COLUMN]):
        labels = batch.column(0)
        num_rows += len(labels)
        if labels.null_count or (len(labels) and pc.min(labels).as_py() < 0):
            raise DataError(f"{printable(path)}: a label is missing or negative; give a labelled split")
        largest = max(largest, pc.max(labels).as_py() if len(labels) else -1)
    if num_rows != file.metadata.num_rows:
        raise DataError(
            f"{printable(path)}: has {num_rows} labels for {file.metadata.num_rows} rows; fetch it again"
        )
    return largest


def _difference(names: tuple[str, ...] | None, others: tuple[str, ...] | None) -> str:
    """The first class that is not the same."""
    if names is None or others is None:
        return "one of the two has none"
    for label, (name, other) in enumerate(zip(names, others, strict=False)):
        if name != other:
            return f"{label} is {printable(name)[:100]!r} there and {printable(other)[:100]!r} here"
    return f"{len(names)} there and {len(others)} here"


def _is_text_or_bytes(kind: pa.DataType) -> bool:
    # A column of nothing but nulls has a type of its own.
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_null,
    )
    return any(test(kind) for test in tests)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{printable(path)}: cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again"
        ) from error


def _image_column(path: Path, schema: pa.Schema) -> str:
    columns = [name for name in _IMAGE_COLUMNS if name in schema.names]
    if not columns or _LABEL_COLUMN not in schema.names:
        raise DataError(
            f"{path}: needs the columns `image` or `img`, and `label`; it has {', '.join(schema.names)}"
        )
    kind = schema.field(columns[0]).type
    kinds = (
        [field.type for field in kind if field.name in ("bytes", "path")]
        if pa.types.is_struct(kind)
        else [kind]
    )
    if not kinds or not all(map(_is_text_or_bytes, kinds)):
        raise DataError(f"{path}: column `{columns[0]}` is {kind}, not a struct with `bytes`")
    if not pa.types.is_integer(schema.field(_LABEL_COLUMN).type):
        raise DataError(
            f"{path}: column `{_LABEL_COLUMN}` is {schema.field(_LABEL_COLUMN).type}, not an integer"
        )
    return columns[0]


def _class_names(path: Path, schema: pa.Schema) -> tuple[str, ...] | None:
    """The names in the `huggingface` entry of the schema's metadata, if there are any."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return None
    for key in ("info", "features", _LABEL_COLUMN, "names"):
        info = info.get(key) if isinstance(info, dict) else None
    if not info:
        return None
    if not isinstance(info, list) or not all(isinstance(name, str) for name in info):
        raise DataError(
            f"{printable(path)}: the class names in its metadata are no list of text; fetch it again"
        )
    return tuple(info)
