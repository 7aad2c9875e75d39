"""The manifest: what it says is so, and damage anywhere in the file is found."""

import hashlib
import json
import os
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders import manifest as manifest_module
from loaders.beton import METADATA_START, read_tables
from loaders.checksum import checksum
from loaders.convert import convert
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.images import open_beton
from loaders.manifest import Manifest, check_opening, manifest_path, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    rng = np.random.default_rng(0)
    for index in range(12):
        path = folder / "images" / f"class{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (100, 90, 3), dtype=np.uint8)).save(path)
    convert(str(folder / "images"), folder / "whole.beton", workers=1, progress=False)
    return folder / "whole.beton"


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copied.beton"
    path.write_bytes(whole.read_bytes())
    manifest_path(path).write_text(manifest_path(whole).read_text())
    return path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def edit(path: Path, *, signed: bool = True, **changes: object) -> None:
    """Change a manifest, with the checksum that belongs to the change unless `signed` is False."""
    values = json.loads(manifest_path(path).read_text()) | changes
    if signed:
        content = {key: value for key, value in values.items() if key != "manifest_sha256"}
        values["manifest_sha256"] = manifest_module._content_sha256(content)
    manifest_path(path).write_text(json.dumps(values))


def write_checksums(path: Path) -> None:
    """Make the manifest agree with whatever stands in the file."""
    with closing(HeldFile(path)) as file:
        blocks = manifest_module.block_checksums(file)
        sha256 = read_tables(file, with_checksums=True).sha256
    edit(path, block_bytes=manifest_module.BLOCK_BYTES, block_sha256=blocks, tables_sha256=sha256)


def test_contents(whole: Path) -> None:
    manifest = check_opening(whole)
    assert manifest == Manifest.load(whole) == verify(whole, num_threads=2)
    assert manifest.num_samples == 12 and manifest.class_counts == (4, 4, 4)
    assert manifest.class_names == ("class0", "class1", "class2")
    assert manifest.num_bytes == whole.stat().st_size
    assert manifest.block_sha256 == (hashlib.sha256(whole.read_bytes()).hexdigest(),)
    assert manifest.storage == {"copied": 0, "jpeg": 12, "raw": 0}
    assert manifest_path(whole).name == "whole.beton.json"


def test_digest_tells_content_and_not_date(whole: Path) -> None:
    manifest = Manifest.load(whole)
    assert replace(manifest, created="another day", source="elsewhere").digest == manifest.digest
    assert replace(manifest, tables_sha256="0").digest != manifest.digest
    assert replace(manifest, class_names=("a", "b", "c")).digest != manifest.digest


def test_flipped_byte_in_an_image_is_found_by_verify_and_when_it_is_read(copied: Path) -> None:
    tables = read_tables(copied)
    flip(copied, int(tables.data_ptrs[7] + tables.data_sizes[7] // np.uint64(2)))
    with pytest.raises(DataError, match=r"block 0 .*does not match its checksum"):
        verify(copied)
    images = open_beton(copied)
    with pytest.raises(DataError, match=r"copied\.beton: sample 7 does not match its checksum"):
        images.image(7)
    images.image(6)


def test_flipped_byte_in_the_tables(copied: Path) -> None:
    flip(copied, METADATA_START + 24 * 3 + 16)  # a label: every table is still valid
    for check in (check_opening, verify):
        with pytest.raises(DataError, match="tables do not match the checksum"):
            check(copied)


def test_a_damaged_sample_is_named_by_verify_though_the_blocks_match(copied: Path) -> None:
    tables = read_tables(copied)
    flip(copied, int(tables.data_ptrs[5] + np.uint64(99)))
    write_checksums(copied)
    with pytest.raises(DataError, match="sample 5 does not match its checksum"):
        verify(copied)


def test_a_block_where_no_sample_stands_is_found_by_verify(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 4096)
    write_checksums(copied)
    assert len(Manifest.load(copied).block_sha256) > 8
    assert verify(copied).num_samples == 12
    flip(copied, 4096 + 2048)
    check_opening(copied)
    with pytest.raises(DataError, match=r"block 1 \(from byte 4096\)"):
        verify(copied)


def test_an_image_that_does_not_decode_is_found_by_verify_though_the_checksums_match(copied: Path) -> None:
    tables = read_tables(copied)
    data = bytearray(copied.read_bytes())
    start, size = int(tables.data_ptrs[5]), int(tables.data_sizes[5])
    data[start + size // 2 : start + size // 2 + 200] = bytes(200)
    position = METADATA_START + 12 * 24 + 5 * 8
    data[position : position + 8] = checksum(data[start : start + size]).to_bytes(8, "little")
    copied.write_bytes(data)
    write_checksums(copied)
    with pytest.raises(DataError, match="sample 5 does not decode"):
        verify(copied)


def test_missing_files(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.beton: no such file; make it with `fast-essl convert"):
        check_opening(tmp_path / "none.beton")
    manifest_path(copied).unlink()
    with pytest.raises(DataError, match=r"its manifest copied\.beton\.json is missing"):
        check_opening(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bytes": 5}, "bytes where its manifest says 5"),
        ({"num_samples": 11}, "12 samples, its manifest says 11"),
        ({"class_counts": [4, 4, 3]}, "12 samples"),
        ({"class_names": ["a", "b"], "class_counts": [6, 6]}, "label 2 is not one of the 2 classes"),
        ({"block_sha256": []}, "lists too few blocks"),
        ({"block_sha256": ["0" * 64] * 2}, "lists too many blocks"),
        ({"format_version": 99}, "not a manifest of version 1 or 2"),
        ({"class_counts": [5, 3, 4]}, "4 images of class 'class0', its manifest says 5"),
        ({"surprise": 1}, r"wrong or missing keys \['surprise'\]"),
    ],
)
def test_manifest_that_does_not_match(copied: Path, changes: dict[str, object], message: str) -> None:
    edit(copied, **changes)
    with pytest.raises(DataError, match=message) as caught:
        check_opening(copied)
    assert "copied.beton" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ["class1", "class0", "class2"]},
        {"source": "another folder"},
        {"manifest_sha256": "0" * 64},
        {"manifest_sha256": None},
    ],
)
def test_a_manifest_that_was_edited_is_refused(copied: Path, changes: dict[str, object]) -> None:
    """Swapped names fit the file as well as the true ones; only the manifest itself can tell."""
    edit(copied, signed=False, **changes)
    for check in (check_opening, verify):
        with pytest.raises(DataError, match="does not match its own checksum manifest_sha256"):
            check(copied)


WRONG = [
    None,
    True,
    -1,
    1.5,
    1e400,
    float("nan"),
    10**30,
    "text",
    [],
    [1],
    ["a", 2],
    [[]],
    {},
    {"a": "b"},
    [{}],
]
WRONG += [["\ud800"], "\ud800", {"name": "n", "reason": 3}, [{"name": "n", "reason": 3}], 1 << 62]
ALLOWED = {
    "source": ("text", "\ud800"),
    "options": ({}, {"a": "b"}, {"name": "n", "reason": 3}),
    "storage": ({},),
    "skipped": ([],),
    "created": ("text",),
}
"""Of what is wrong elsewhere; nothing that is read of a file depends on these."""


@pytest.mark.parametrize("key", [field.name for field in fields(Manifest)])
def test_a_value_of_a_wrong_kind_or_size_is_one_line(copied: Path, key: str) -> None:
    whole = manifest_path(copied).read_text()
    for wrong in WRONG:
        if wrong in ALLOWED.get(key, ()):
            continue
        manifest_path(copied).write_text(whole)
        edit(copied, **{key: wrong})
        with pytest.raises(DataError) as caught:
            check_opening(copied)
        assert "copied.beton" in str(caught.value) and "\n" not in str(caught.value), wrong


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"options": ' * 100_000,
        "null",
        "[]",
        '{"format_version": ' + "9" * 5000 + "}",
        '{"format_version": 1e999}',
        '{"format_version": true}',
        '{"format_version": [1]}',
    ],
)
def test_a_text_that_is_no_manifest_is_one_line(copied: Path, text: str) -> None:
    manifest_path(copied).write_text(text)
    with pytest.raises(DataError, match=r"copied\.beton\.json: ") as caught:
        check_opening(copied)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_a_gigabyte_is_not_read(copied: Path) -> None:
    os.truncate(manifest_path(copied), 1 << 30)
    with pytest.raises(DataError, match="too many for a manifest"):
        check_opening(copied)


def test_bytes_that_are_no_text_are_one_line(copied: Path) -> None:
    manifest_path(copied).write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        check_opening(copied)


def test_a_skipped_name_that_is_not_utf8_is_kept(whole: Path, tmp_path: Path) -> None:
    manifest = replace(Manifest.load(whole), skipped=({"name": "\udcff.jpg", "reason": "is empty"},))
    (tmp_path / "m.json").write_bytes(manifest.to_json())
    assert Manifest.read(tmp_path / "m.json") == manifest


def test_manifest_that_is_not_json(copied: Path) -> None:
    manifest_path(copied).write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        check_opening(copied)


def test_file_cut_short(copied: Path) -> None:
    copied.write_bytes(copied.read_bytes()[:-10])
    with pytest.raises(DataError, match="bytes where its manifest says"):
        check_opening(copied)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_no_file(path):
    with pytest.raises(DataError, match=r"is a folder; give the name of a \.beton file"):
        check_opening(Path(path))
