"""The manifest: what it says is so, and damage anywhere in the file is found."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders import manifest as manifest_module
from loaders.beton import METADATA_START, read_tables
from loaders.convert import convert
from loaders.errors import DataError
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


def edit(path: Path, **changes: object) -> None:
    values = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps(values | changes))


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


def test_flipped_byte_in_an_image(copied: Path) -> None:
    tables = read_tables(copied)
    flip(copied, int(tables.data_ptrs[7] + tables.data_sizes[7] // np.uint64(2)))
    for check in (check_opening, verify):
        with pytest.raises(DataError, match=r"block 0 .*does not match its checksum"):
            check(copied)


def test_flipped_byte_in_the_tables(copied: Path) -> None:
    flip(copied, METADATA_START + 24 * 3 + 16)  # a label: every table is still valid
    for check in (check_opening, verify):
        with pytest.raises(DataError, match="tables do not match the checksum"):
            check(copied)


def test_a_block_that_opening_does_not_sample_is_found_by_verify(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 4096)
    block_sha256, _ = manifest_module.checksums(copied)
    edit(copied, block_bytes=4096, block_sha256=block_sha256)
    assert len(block_sha256) > 8
    assert verify(copied).num_samples == 12
    flip(copied, 4096 + 2048)
    check_opening(copied)
    with pytest.raises(DataError, match=r"block 1 \(from byte 4096\)"):
        verify(copied)


def test_an_image_that_does_not_decode_is_found_by_verify_though_the_checksums_match(copied: Path) -> None:
    tables = read_tables(copied)
    data = bytearray(copied.read_bytes())
    middle = int(tables.data_ptrs[5] + tables.data_sizes[5] // np.uint64(2))
    data[middle : middle + 200] = bytes(200)
    copied.write_bytes(data)
    block_sha256, tables_sha256 = manifest_module.checksums(copied)
    edit(copied, block_sha256=block_sha256, tables_sha256=tables_sha256)
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
        ({"format_version": 99}, "not a manifest of version 1"),
        ({"surprise": 1}, r"wrong or missing keys \['surprise'\]"),
    ],
)
def test_manifest_that_does_not_match(copied: Path, changes: dict[str, object], message: str) -> None:
    edit(copied, **changes)
    with pytest.raises(DataError, match=message) as caught:
        check_opening(copied)
    assert "copied.beton" in str(caught.value) and "\n" not in str(caught.value)


def test_manifest_that_is_not_json(copied: Path) -> None:
    manifest_path(copied).write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        check_opening(copied)


def test_file_cut_short(copied: Path) -> None:
    copied.write_bytes(copied.read_bytes()[:-10])
    with pytest.raises(DataError, match="bytes where its manifest says"):
        check_opening(copied)
