"""Files that are damaged, cut short, overwritten or replaced: every loader notices, whenever it happens."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import photograph

from loaders import block_check, open_loader
from loaders.beton import METADATA_START, BetonTables, read_tables
from loaders.convert import convert
from loaders.errors import DataError
from loaders.held_file import HeldFile
from loaders.images import open_beton
from loaders.manifest import Manifest, check_opening, manifest_path, verify
from loaders.recipe import Recipe
from loaders.waiting import MAX_WAIT_VARIABLE

DATA = Path(__file__).parents[1] / "data"
RECIPES = (Recipe(size=16), Recipe(size=8, interpolation="bilinear"))
BATCH = 2


def is_there(name):
    package = {"ffcv": "ffcv", "dali": "nvidia"}.get(name)
    if package is None:
        return True
    found = importlib.util.find_spec(package) is not None
    return found and (name != "dali" or importlib.util.find_spec("nvidia.dali") is not None)


LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(not is_there(name), reason=f"{name} is not installed"))
    for name in ("ffcv", "torch", "device", "dali")
]
STREAMING = [loader for loader in LOADERS if loader.values != ("device",)]
"""Those that read during an epoch."""


def opened(name, path):
    options = {"decoder": "cpu"} if name == "dali" else {}
    return open_loader(
        name, path, RECIPES, batch_size=BATCH, drop_last=False, shuffle=False, num_workers=1, **options
    )


def read_all(name, path):
    loader = opened(name, path)
    try:
        return [int(images.sum()) for crops in loader.epoch(0) for images in crops.images]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """24 samples: raw images of 40² pixels, and four JPEGs in between."""
    folder = tmp_path_factory.mktemp("damage")
    for index in range(24):
        path = folder / "images" / f"class{index // 12}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % 6 == 3:
            photograph(index, 70, 90).save(path.with_suffix(".jpg"), quality=90)
        else:
            photograph(index, 40, 40).save(path)
    convert(str(folder / "images"), folder / "whole.beton", workers=1, progress=False)
    return folder / "whole.beton"


@pytest.fixture
def copied(whole, tmp_path):
    path = tmp_path / "copied.beton"
    shutil.copy(whole, path)
    shutil.copy(manifest_path(whole), manifest_path(path))
    return path


def as_version_1(path, *, block_bytes):
    """Give a file the manifest that 0.1.0 would have written, with small blocks."""
    data = path.read_bytes()
    blocks = [
        hashlib.sha256(data[at : at + block_bytes]).hexdigest() for at in range(0, len(data), block_bytes)
    ]
    values = json.loads(manifest_path(path).read_text())
    del values["manifest_sha256"]
    values |= {
        "format_version": 1,
        "block_bytes": block_bytes,
        "block_sha256": blocks,
        "tables_sha256": read_tables(path).sha256,
    }
    manifest_path(path).write_text(json.dumps(values))


def flip(path, position, bit):
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def image_bytes(tables: BetonTables):
    """All positions that belong to a sample."""
    spans = zip(tables.data_ptrs.tolist(), tables.data_sizes.tolist(), strict=True)
    return np.concatenate([np.arange(start, start + size) for start, size in spans])


@pytest.mark.parametrize("name", LOADERS)
def test_a_flipped_bit_in_any_image_is_named_when_it_is_read(name, copied):
    tables = read_tables(copied)
    random = np.random.default_rng(1)
    # The torch loader starts a process each time.
    for position in random.choice(image_bytes(tables), 3 if name == "torch" else 12, replace=False):
        flip(copied, position, bit := int(random.integers(8)))
        sample = int(np.searchsorted(tables.data_ptrs, position, side="right")) - 1
        with pytest.raises(DataError, match=rf"copied\.beton: sample {sample} does not match its checksum"):
            read_all(name, copied)
        flip(copied, position, bit)
    assert len(read_all(name, copied)) == 24


def test_a_flipped_bit_in_any_table_is_found_when_the_file_is_opened(copied):
    num_samples = read_tables(copied).num_samples
    random = np.random.default_rng(2)
    front, back = METADATA_START + 32 * num_samples, copied.stat().st_size - 24 * num_samples
    positions = [
        *range(24),
        *random.integers(24, METADATA_START, 20).tolist(),
        *random.integers(METADATA_START, METADATA_START + 24 * num_samples, 40).tolist(),
        *random.integers(METADATA_START + 24 * num_samples, front, 40).tolist(),
        *random.integers(back, copied.stat().st_size, 40).tolist(),
    ]
    for position in positions:
        flip(copied, position, bit := int(random.integers(8)))
        with pytest.raises(DataError, match=r"copied\.beton: ") as caught:
            check_opening(copied)
        assert "\n" not in str(caught.value)
        flip(copied, position, bit)
    check_opening(copied)


def test_a_flipped_bit_anywhere_is_found_by_verify(copied):
    random = np.random.default_rng(3)
    for position in random.integers(0, copied.stat().st_size, 40):
        flip(copied, position, bit := int(random.integers(8)))
        with pytest.raises(DataError, match=r"copied\.beton: "):
            verify(copied, num_threads=1)
        flip(copied, position, bit)
    verify(copied)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(copied):
    path, expected = manifest_path(copied), Manifest.load(copied)
    random = np.random.default_rng(4)
    for position in range(path.stat().st_size):
        flip(path, position, bit := int(random.integers(8)))
        with pytest.raises(DataError) as caught:
            check_opening(copied)
        assert "\n" not in str(caught.value)
        flip(path, position, bit)
    assert check_opening(copied) == expected


@pytest.mark.parametrize("name", STREAMING)
def test_a_file_cut_short_while_it_is_read_is_an_error(name, copied):
    """A memory map would end the process with SIGBUS."""
    loader = opened(name, copied)
    epoch = loader.epoch(0)
    next(epoch)
    os.truncate(copied, int(read_tables(copied).data_ptrs[20]) + 5)
    with pytest.raises(
        DataError, match=r"copied\.beton: ends before byte \d+, and had \d+ bytes when it was op"
    ):
        list(epoch)
    with pytest.raises(DataError, match=r"copied\.beton: was changed"):
        next(loader.epoch(1))
    loader.close()


@pytest.fixture
def other(whole, tmp_path):
    """The same layout, inverted pixels, and a matching manifest."""
    folder = tmp_path / "other"
    for source in sorted((whole.parent / "images").rglob("*.*")):
        path = folder / source.parent.name / f"{source.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(source).resize((40, 40)))).save(path)
    convert(str(folder), tmp_path / "other.beton", workers=1, progress=False)
    return tmp_path / "other.beton"


@pytest.mark.parametrize("name", STREAMING)
def test_a_file_that_is_replaced_stays_as_it_was_opened_until_the_next_epoch(name, copied, other):
    expected = read_all(name, copied)
    loader = opened(name, copied)
    epoch = loader.epoch(0)
    found = [int(images.sum()) for images in next(epoch).images]
    os.replace(other, copied)
    os.replace(manifest_path(other), manifest_path(copied))
    found += [int(images.sum()) for crops in epoch for images in crops.images]
    assert found == expected
    with pytest.raises(
        DataError, match=r"copied\.beton: was changed, replaced or removed since it was opened"
    ):
        next(loader.epoch(1))
    loader.close()
    assert read_all(name, copied) != expected


@pytest.mark.parametrize("name", STREAMING)
def test_a_file_overwritten_in_place_is_noticed_at_the_sample(name, copied):
    loader = opened(name, copied)
    epoch = loader.epoch(0)
    next(epoch)
    tables = read_tables(copied)
    with open(copied, "r+b") as file:
        for sample in (21, 22):
            file.seek(int(tables.data_ptrs[sample]))
            file.write(bytes(int(tables.data_sizes[sample])))
    for _ in range(9):
        next(epoch)
    with pytest.raises(DataError, match=r"sample 21 does not match its checksum.*--verify"):
        next(epoch)
    loader.close()


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_begins_by_looking_at_the_file(name, copied):
    loader = opened(name, copied)
    list(loader.epoch(0))
    status = copied.stat()
    os.utime(copied, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"copied\.beton: was changed"):
        next(loader.epoch(1))
    os.utime(copied, ns=(status.st_atime_ns, status.st_mtime_ns))
    next(loader.epoch(1))
    copied.unlink()
    with pytest.raises(DataError, match=r"copied\.beton: was changed, replaced or removed"):
        next(loader.epoch(2))
    loader.close()


@pytest.mark.parametrize("name", LOADERS)
def test_closing_twice_is_fine_and_use_after_it_an_error(name, copied):
    loader = opened(name, copied)
    running = loader.epoch(0)
    next(running)
    descriptor = loader.images.file.descriptor
    loader.close()
    loader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    for epoch in (running, loader.epoch(1)):
        with pytest.raises(ValueError, match="closed"):
            next(epoch)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_that_nobody_holds_closes_its_file(name, copied):
    loader = opened(name, copied)
    descriptor = loader.images.file.descriptor
    del loader
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_link_to_a_file_whose_manifest_lies_beside_it(copied, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "data.beton"
    link.symlink_to(copied)
    assert check_opening(link) == check_opening(copied)
    # As a cache names its files: both are links, and the names differ.
    stored = tmp_path / "0123.beton"
    copied.rename(stored)
    manifest_path(copied).rename(tmp_path / "4567")
    link.unlink()
    link.symlink_to(stored)
    manifest_path(link).unlink(missing_ok=True)
    link.with_name("data.beton.json").symlink_to(tmp_path / "4567")
    assert check_opening(link).num_samples == 24


@pytest.mark.parametrize("which", ["file", "manifest"])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(copied, which):
    path = copied if which == "file" else manifest_path(copied)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"copied\.beton.*(no such file|is missing|not a regular file)"):
        check_opening(copied)
    with pytest.raises(DataError, match="is not a regular file"):
        HeldFile(path)


VERSION_1 = DATA / "version_1.beton"


@pytest.fixture
def nothing_said():
    block_check._said.clear()


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_of_0_1_0_is_still_read(name, nothing_said, caplog):
    caplog.set_level(logging.WARNING)
    assert Manifest.load(VERSION_1).format_version == 1
    assert verify(VERSION_1).num_samples == 9
    images = open_beton(VERSION_1)
    expected = [np.asarray(photograph(index, 8, 9)) for index in (0, 2, 4, 6)]
    assert all(np.array_equal(images.image(n), pixels) for n, pixels in enumerate(expected))
    assert len(read_all(name, VERSION_1)) == len(read_all(name, VERSION_1)) == 10
    (record,) = caplog.records
    assert (
        record.getMessage().startswith(f"{VERSION_1}: was made by fast_essl 0.1.0") and "\n" not in record.msg
    )


def read_until_checked(name, path):
    loader = opened(name, path)
    for epoch in range(2):
        list(loader.epoch(epoch))
        loader.images.block_check.wait()


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_block_of_0_1_0_is_found_in_the_background(name, copied, nothing_said):
    as_version_1(copied, block_bytes=4096)
    loader = opened(name, copied)
    list(loader.epoch(0))
    loader.images.block_check.wait()
    list(loader.epoch(1))
    loader.close()
    flip(copied, 4096 + 2048, 3)
    # The device loader may find it while it opens the file, the others at the next batch.
    with pytest.raises(
        DataError, match=r"copied\.beton: block 1 \(from byte 4096\) does not match"
    ) as caught:
        read_until_checked(name, copied)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="block 1"):
        verify(copied)


def test_a_process_is_not_forked_in_the_middle_of_hashing():
    """Its own first digest would wait for ever: a torch worker hung in one of some runs."""
    is_held, is_over = threading.Event(), threading.Event()

    def hash_a_block():
        with block_check._hashing:
            is_held.set()
            time.sleep(0.2)
            is_over.set()

    thread = threading.Thread(target=hash_a_block)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if is_over.is_set() and block_check._hashing.acquire(timeout=1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()


def test_a_sample_that_is_good_at_a_second_look_is_no_less_an_error(copied):
    """Only FFCV looks twice: the first time in compiled code, then for the reason."""
    pytest.importorskip("ffcv")
    loader = opened("ffcv", copied)
    from loaders.cut import NOT_READ

    assert "could not be read at first" in str(loader._failure(3, NOT_READ))
    loader.close()


def test_a_worker_that_stands_still_is_named(copied, monkeypatch):
    monkeypatch.setenv(MAX_WAIT_VARIABLE, "1")
    loader = opened("torch", copied)
    epoch = loader.epoch(0)
    next(epoch)
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1:]
    os.kill(int(worker), signal.SIGSTOP)
    with pytest.raises(DataError, match=r"a worker process gave nothing for 1 s") as caught:
        list(epoch)
    assert "\n" not in str(caught.value)
    loader.close()
