"""The conversion: source → encoded images → a .beton file and its manifest, both or neither."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import PIL
from PIL import features
from tqdm import tqdm

from loaders.beton import IMAGE_JPEG, BetonWriter, read_tables
from loaders.convert import cifar
from loaders.convert.encode import Encoded, EncodeOptions, Encoding, encode_sample
from loaders.convert.folder import open_folder
from loaders.convert.photo_digits import open_photo_digits
from loaders.convert.pool import map_samples
from loaders.convert.publish import check_destination, part_file, publish, resolve_destination
from loaders.convert.shards import find_parquet, select_pattern, select_split
from loaders.convert.source import Source
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.image_folder import unreadable
from loaders.jpeg import decoder_name
from loaders.manifest import BLOCK_BYTES, FORMAT_VERSION, Manifest, block_checksums, manifest_path
from loaders.names import printable
from loaders.signals import terminated_as_exit

NAMED_SOURCES: Final = ("cifar10", "photo-digits")


def convert(
    source: str,
    dest: Path,
    *,
    split: str = "train",
    max_side: int | None = None,
    max_pixels: int | None = None,
    quality: int = 90,
    encoding: Encoding = "auto",
    workers: int = 0,
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Convert a source of labelled images into a .beton file with its manifest beside it.

    The same source and options give the same bytes, whatever the number of workers.

    Args:
        source: an image folder; a parquet file, a folder of them, or a pattern with `*`; the CIFAR-10 python
            archive or its folder; "cifar10" (downloaded) or "photo-digits" (made here).
        dest: the file to make. Its folder must exist.
        split: which part of a source that has several, as train, test; exactly its name.
        max_side: bring larger images down to this many pixels on their longer side.
        max_pixels: refuse larger images; None = 178,956,970, or four times that with `max_side`.
        quality: of the JPEG encoding, 1 to 100.
        encoding: "auto" keeps JPEG streams that fit and stores other images of at most 64 pixels a side raw;
            "jpeg" and "raw" force one.
        workers: processes that decode and encode; 0 = all cores.
        on_error: "fail" ends at the first image that cannot be stored, "skip" leaves it out and lists it in
            the manifest. What cannot be read at all ends it either way.
        overwrite: replace `dest` if it exists.
        progress: show a bar with images/s on stderr.

    Returns the manifest. Errors: DataError, one line that names the thing and what to do; nothing is left
    behind then.
    """
    options = EncodeOptions(max_side=max_side, quality=quality, encoding=encoding, max_pixels=max_pixels)
    if workers < 0:
        raise DataError(f"--workers {workers}: give 0 for all cores, or a number of processes")
    if on_error not in ("fail", "skip"):
        raise DataError(f"--on-error {on_error}: not one of fail, skip")
    dest = resolve_destination(dest)
    check_destination(dest, overwrite)
    opened = open_source(source, split, quality=quality, progress=progress)
    with terminated_as_exit(), part_file(dest) as part:
        with closing(BetonWriter(part, max_samples=opened.num_samples)) as writer:
            counts, storage, skipped = _fill(writer, opened, options, workers, on_error, progress)
            writer.finish()
        with closing(HeldFile(part)) as written:
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                num_samples=writer.num_samples,
                num_bytes=written.num_bytes,
                class_names=opened.class_names,
                class_counts=tuple(counts[label] for label in range(len(opened.class_names))),
                source=opened.description,
                options=_describe(options, split, on_error),
                storage={key: storage[key] for key in ("copied", "jpeg", "raw")} | _repaired(storage),
                block_bytes=BLOCK_BYTES,
                block_sha256=block_checksums(written),
                tables_sha256=read_tables(written, with_checksums=True).sha256,
                skipped=tuple(skipped),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        publish(manifest, part, dest, overwrite=overwrite)
    return manifest


def open_source(source: str, split: str, *, quality: int, progress: bool) -> Source:
    """The source that `source` names, told by what it is. Errors: DataError if it is none."""
    if source == "photo-digits":
        return open_photo_digits(split, quality=quality)
    if source == "cifar10":
        folder = cifar.cache_folder()
        if progress:
            print(f"cifar10: from {cifar.URL}, kept in {folder}", file=sys.stderr)
        return cifar.open_cifar10(cifar.download(cifar.URL, cifar.MD5, folder), split)
    try:
        return _open_path(source, Path(source), split)
    except OSError as error:
        raise unreadable(error, Path(source)) from error


def _open_path(source: str, path: Path, split: str) -> Source:
    shown = printable(source)
    if any(character in source for character in "*?") and not path.exists():
        return _open_parquet(select_pattern(source), f"parquet files {shown}")
    if path.is_dir():
        if any((folder / "batches.meta").is_file() for folder in (path, path / cifar.FOLDER)):
            return cifar.open_cifar10(path, split)
        files = find_parquet(path)
        if files:
            return _open_parquet(select_split(path, files, split), f"parquet files {split}, {shown}")
        return open_folder(path, split)
    if not path.is_file():
        raise DataError(
            f"{shown}: no such file or folder, nor one of {', '.join(NAMED_SOURCES)}; check the path"
        )
    if path.suffix == ".parquet":
        return _open_parquet([path], f"parquet file {shown}")
    if ".tar" in path.suffixes or path.suffix == ".tgz":
        return cifar.open_cifar10(path, split)
    if path.suffix == ".beton":
        has_manifest = manifest_path(path).is_file()
        raise DataError(
            f"{shown}: is a .beton file with its manifest, converted already; use it as it is"
            if has_manifest
            else f"{shown}: is a .beton file without a manifest, as stock FFCV writes it; such a file cannot be taken "
            "over yet: give the images that it was made from"
        )
    raise DataError(
        f"{shown}: neither .parquet nor a CIFAR-10 archive (.tar.gz); give one, or an image folder"
    )


def _open_parquet(files: list[Path], description: str) -> Source:
    try:
        from loaders.convert.parquet import open_parquet
    except ImportError as error:
        raise DataError(f"{description}: needs pyarrow; install it with `pip install pyarrow`") from error
    return open_parquet(files, description)


def _fill(
    writer: BetonWriter, source: Source, options: EncodeOptions, workers: int, on_error: str, progress: bool
) -> tuple[Counter[int], Counter[str], list[dict[str, str]]]:
    """Write all samples: images a class, images a way of storage, and what was skipped."""
    counts: Counter[int] = Counter()
    storage: Counter[str] = Counter()
    skipped: list[dict[str, str]] = []
    encoded = map_samples(partial(encode_sample, options=options), source.samples(), num_workers=workers)
    bar = tqdm(total=source.num_samples, desc="convert", unit="images", smoothing=0.05, disable=not progress)
    with closing(encoded), bar:
        for num_seen, (sample, result) in enumerate(encoded):
            if num_seen == source.num_samples:
                raise DataError(f"{source.description}: grew meanwhile; convert again when it is complete")
            if isinstance(result, Encoded):
                writer.add(result.mode, result.width, result.height, sample.label, result.payload)
                counts[sample.label] += 1
                storage["repaired"] += result.repaired
                storage["copied" if result.copied else "jpeg" if result.mode == IMAGE_JPEG else "raw"] += 1
            elif on_error == "fail":
                raise DataError(
                    f"{sample.name}: {result.reason}; repair or remove it, or use --on-error skip"
                )
            else:
                skipped.append({"name": sample.name, "reason": result.reason})
            bar.update()
    if writer.num_samples == 0:
        raise DataError(f"{source.description}: no image could be stored; the first: {_first(skipped)}")
    return counts, storage, skipped


def _repaired(storage: Counter[str]) -> dict[str, int]:
    """How many of the encoded images are JPEGs with stray bytes or no end marker, if any are."""
    return {"repaired": storage["repaired"]} if storage["repaired"] else {}


def _first(skipped: list[dict[str, str]]) -> str:
    return f"{skipped[0]['name']} {skipped[0]['reason']}" if skipped else "there is none"


def _describe(options: EncodeOptions, split: str, on_error: str) -> dict[str, Any]:
    return {
        "split": split,
        "max_side": options.max_side,
        "max_pixels": options.pixel_limit,
        "quality": options.quality,
        "encoding": options.encoding,
        "on_error": on_error,
        "jpeg_checked_by": decoder_name(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
    }
