"""Sources: image folders, parquet files, CIFAR-10's archive and its download, told by what they are."""

import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import IMAGE_RAW, read_tables
from loaders.convert import cifar, convert
from loaders.convert.run import open_source
from loaders.convert.source import Source
from loaders.errors import DataError
from loaders.manifest import Manifest, check_opening

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
RNG = np.random.default_rng(0)


def picture(side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(source: Path | str, split: str = "train") -> Source:
    return open_source(str(source), split, quality=90, progress=False)


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())
    return folder


# Image folders


def test_folder_order_hidden_files_and_nesting(tmp_path: Path) -> None:
    fill(tmp_path, ["b/2.png", "b/1.png", "a/deep/3.png", "a/0.png", ".git/x.png", "b/.DS_Store"])
    (tmp_path / "README.txt").write_text("hello")
    source = opened(tmp_path)
    assert source.class_names == ("a", "b") and source.num_samples == 4
    names = [(str(Path(sample.name).relative_to(tmp_path)), sample.label) for sample in source.samples()]
    assert names == [("a/0.png", 0), ("a/deep/3.png", 0), ("b/1.png", 1), ("b/2.png", 1)]


def test_folder_of_splits(tmp_path: Path) -> None:
    fill(tmp_path, ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"])
    assert [Path(sample.name).name for sample in opened(tmp_path, "val").samples()] == ["3.png", "4.png"]
    with pytest.raises(DataError, match="has no split 'test'; give one of train, val with --split"):
        opened(tmp_path, "test")


def test_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{index % 3}/{index}.png" for index in range(150)])
    (tmp_path / "in" / "1" / "100.png").write_bytes(b"broken")
    manifests = [
        convert(str(tmp_path / "in"), tmp_path / f"{n}.beton", workers=n, on_error="skip", progress=False)
        for n in (1, 3)
    ]
    assert manifests[0].digest == manifests[1].digest
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()
    assert manifests[0].skipped == manifests[1].skipped and len(manifests[0].skipped) == 1


@pytest.mark.skipif(
    not (SHARED / "data/imagenet-sample").is_dir(), reason="needs ../shared/data/imagenet-sample"
)
def test_real_photographs_are_copied(tmp_path: Path) -> None:
    folder = SHARED / "data/imagenet-sample"
    manifest = convert(str(folder), tmp_path / "photos.beton", progress=False)
    assert manifest.num_samples == 373 and len(manifest.class_names) == 373
    assert manifest.storage == {"copied": 365, "jpeg": 8, "raw": 0}
    tables = read_tables(tmp_path / "photos.beton")
    data = np.memmap(tmp_path / "photos.beton", np.uint8, "r")
    for index, sample in enumerate(open_source(str(folder), "train", quality=90, progress=False).samples()):
        start, size = int(tables.data_ptrs[index]), int(tables.data_sizes[index])
        image = Image.open(sample.name)
        assert image.size == (tables.widths[index], tables.heights[index])
        assert (data[start : start + size].tobytes() == Path(sample.name).read_bytes()) == (
            image.mode == "RGB"
        )


# Parquet


def write_parquet(
    path: Path,
    labels: Sequence[int | None],
    *,
    column: str = "image",
    names: list[str] | None = None,
    flat: bool = False,
) -> list[bytes]:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [picture() for _ in labels]
    rows = images if flat else [{"bytes": image, "path": None} for image in images]
    table = pa.table({column: rows, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return images


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("flat", [False, True])
def test_parquet_rows(tmp_path: Path, column: str, flat: bool) -> None:
    images = write_parquet(
        tmp_path / "x.parquet", [1, 0, 2, 1], column=column, flat=flat, names=["u", "v", "w"]
    )
    source = opened(tmp_path / "x.parquet")
    assert source.class_names == ("u", "v", "w") and source.num_samples == 4
    samples = list(source.samples())
    assert [sample.image for sample in samples] == images
    assert [sample.label for sample in samples] == [1, 0, 2, 1]
    assert samples[3].name == f"{tmp_path / 'x.parquet'}: row 3"


def test_parquet_without_names_is_named_by_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [3, 0])
    assert opened(tmp_path / "x.parquet").class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_parquet_folder_is_split_by_file_names(tmp_path: Path, subfolder: str) -> None:
    folder = tmp_path / subfolder
    write_parquet(folder / "train-00001-of-00002.parquet", [1, 1])
    write_parquet(folder / "train-00000-of-00002.parquet", [0])
    write_parquet(folder / "test-00000-of-00001.parquet", [2])
    assert [sample.label for sample in opened(tmp_path).samples()] == [0, 1, 1]
    assert [sample.label for sample in opened(tmp_path, "test").samples()] == [2]
    assert [sample.label for sample in opened(f"{folder}/t*-00000-*.parquet").samples()] == [2, 0]
    with pytest.raises(DataError, match="no parquet files of split 'val'; give one of test, train"):
        opened(tmp_path, "val")


def test_parquet_names_that_tell_no_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part1.parquet", [0])
    write_parquet(tmp_path / "part2.parquet", [1])
    assert opened(tmp_path).num_samples == 2


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for labels, names, message in (
        ([0, None], None, "a label is missing or negative"),
        ([0, -1], None, "a label is missing or negative"),
        ([0, 2], ["u", "v"], "label 2 has no name"),
    ):
        write_parquet(path, labels, names=names)
        with pytest.raises(DataError, match=message):
            opened(path)
    write_parquet(path, [0], column="picture")
    with pytest.raises(
        DataError, match="needs the columns `image` or `img`, and `label`; it has picture, label"
    ):
        opened(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as parquet"):
        opened(path)
    with pytest.raises(DataError, match="no parquet files there"):
        opened(f"{tmp_path}/none-*.parquet")


def test_parquet_damaged_within(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, list(range(6)))
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page's header
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as parquet"):
        convert(str(path), tmp_path / "x.beton", workers=1, progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.parquet"]


@pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="needs ../shared/data/cifar10")
def test_real_cifar10_parquet_keeps_every_pixel(tmp_path: Path) -> None:
    manifest = convert(str(SHARED / "data/cifar10"), tmp_path / "test.beton", split="test", progress=False)
    assert manifest.class_counts == (1000,) * 10 and manifest.class_names[9] == "truck"
    assert manifest.storage == {"copied": 0, "jpeg": 0, "raw": 10_000}
    tables = read_tables(tmp_path / "test.beton")
    assert set(tables.modes) == {IMAGE_RAW}
    data = np.memmap(tmp_path / "test.beton", np.uint8, "r")
    for index, sample in enumerate(opened(SHARED / "data/cifar10", "test").samples()):
        if index % 97 == 0:
            start = int(tables.data_ptrs[index])
            stored = data[start : start + 3072].reshape(32, 32, 3)
            np.testing.assert_array_equal(stored, Image.open(io.BytesIO(sample.image)))  # type: ignore[arg-type]
            assert tables.labels[index] == sample.label


# CIFAR-10 as published


def cifar_folder(folder: Path, num_rows: int = 4) -> Path:
    folder = folder / cifar.FOLDER
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = RNG.integers(0, 256, (num_rows, 3072), dtype=np.uint8)
        values = {b"data": data, b"labels": [number] * num_rows, b"filenames": [b"x.png"] * num_rows}
        (folder / name).write_bytes(pickle.dumps(values, protocol=4))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [f"c{n}".encode() for n in range(10)]})
    )
    return folder


def cifar_archive(folder: Path) -> Path:
    inside = cifar_folder(folder)
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(inside, cifar.FOLDER)
    return path


def test_cifar_archive_and_folder(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path)
    for source in (path, tmp_path, tmp_path / cifar.FOLDER):
        assert [sample.label for sample in opened(source).samples()] == [
            n for n in range(5) for _ in range(4)
        ]
        assert opened(source).class_names == tuple(f"c{n}" for n in range(10))
        samples = list(opened(source, "test").samples())
        assert [sample.label for sample in samples] == [5] * 4
    batch = pickle.loads((tmp_path / cifar.FOLDER / "test_batch").read_bytes())
    planes = batch[b"data"][2].reshape(3, 32, 32)
    manifest = convert(str(path), tmp_path / "c.beton", split="test", workers=1, progress=False)
    assert manifest.storage["raw"] == 4
    start = int(read_tables(tmp_path / "c.beton").data_ptrs[2])
    stored = np.fromfile(tmp_path / "c.beton", np.uint8, 3072, offset=start).reshape(32, 32, 3)
    np.testing.assert_array_equal(stored, planes.transpose(1, 2, 0))


def test_cifar_errors(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path)
    with pytest.raises(DataError, match="CIFAR-10 has no split 'val'; give one of train, test"):
        opened(path, "val")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"cut\.tar\.gz"):
        list(opened(cut, "test").samples())
    (tmp_path / cifar.FOLDER / "test_batch").unlink()
    with pytest.raises(
        DataError, match="test_batch cannot be read from this CIFAR-10 python archive or folder"
    ):
        list(opened(tmp_path, "test").samples())
    (tmp_path / cifar.FOLDER / "test_batch").write_bytes(pickle.dumps({b"data": [1], b"labels": [1]}))
    with pytest.raises(DataError, match="`data` of test_batch is not an array"):
        list(opened(tmp_path, "test").samples())


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path)
    witness = tmp_path / "witness"
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": _Touch(witness)}))
    with pytest.raises(DataError, match="which no batch of CIFAR-10 does"):
        opened(tmp_path)
    assert not witness.exists()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", folder
        listening.shutdown()
        thread.join()


def test_cifar10_is_downloaded_checked_kept_and_said(
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, folder = server
    archive = cifar_archive(folder)
    monkeypatch.setattr(cifar, "URL", f"{address}/{archive.name}")
    monkeypatch.setattr(cifar, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = convert("cifar10", tmp_path / "c.beton", split="test", workers=1)
    kept = tmp_path / "cache" / "fast_essl"
    assert manifest.num_samples == 4 and [path.name for path in kept.iterdir()] == [archive.name]
    assert f"kept in {kept}" in capsys.readouterr().err
    archive.unlink()  # what is kept serves the next time
    assert (
        convert("cifar10", tmp_path / "d.beton", split="test", workers=1, progress=False).digest
        == manifest.digest
    )


def test_a_partial_download_is_never_taken_for_the_whole(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    archive = cifar_archive(folder)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    whole = archive.read_bytes()
    kept = tmp_path / "kept"
    archive.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=f"what came has the MD5 .*, not {md5}"):
        cifar.download(f"{address}/{archive.name}", md5, kept)
    assert list(kept.iterdir()) == []
    archive.write_bytes(whole)
    (kept / archive.name).write_bytes(whole[:-100])  # as an interrupted copy would leave it
    assert cifar.download(f"{address}/{archive.name}", md5, kept).read_bytes() == whole


def test_download_errors(server: tuple[str, Path], tmp_path: Path) -> None:
    address, _ = server
    with pytest.raises(DataError, match=r"none\.tar\.gz: cannot be fetched .*404.*fetch it by hand"):
        cifar.download(f"{address}/none.tar.gz", "0", tmp_path)
    with pytest.raises(DataError, match="cannot be fetched"):
        cifar.download("http://127.0.0.1:9/x.tar.gz", "0", tmp_path)


# What a source is


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder, nor one of cifar10, photo-digits"):
        opened(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: neither \.parquet nor a CIFAR-10 archive"):
        opened(tmp_path / "notes.txt")


def test_a_beton_file_is_no_source_and_what_it_is_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "in", ["a/1.png"])
    convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1, progress=False)
    with pytest.raises(DataError, match=r"x\.beton: is a \.beton file with its manifest, converted already"):
        opened(tmp_path / "x.beton")
    (tmp_path / "x.beton.json").unlink()
    with pytest.raises(
        DataError, match=r"x\.beton: is a \.beton file without a manifest, as stock FFCV writes it"
    ):
        opened(tmp_path / "x.beton")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\0b", "a\nb", "\udcff"])
def test_sources_of_impossible_names(tmp_path: Path, name: str) -> None:
    for source in (f"{tmp_path}/{name}", f"{tmp_path}/{name}*"):
        with pytest.raises(DataError) as caught:
            opened(source)
        str(caught.value).encode()
        assert "\n" not in str(caught.value)


def test_manifest_tells_the_source_and_the_options(tmp_path: Path) -> None:
    fill(tmp_path / "in", ["a/1.png", "b/2.png"])
    convert(
        str(tmp_path / "in"),
        tmp_path / "x.beton",
        max_side=20,
        quality=80,
        encoding="jpeg",
        workers=1,
        progress=False,
    )
    manifest: Manifest = check_opening(tmp_path / "x.beton")
    assert str(tmp_path / "in") in manifest.source
    wanted = {"max_side": 20, "quality": 80, "encoding": "jpeg", "split": "train", "on_error": "fail"}
    assert wanted.items() <= manifest.options.items()
    assert read_tables(tmp_path / "x.beton").widths.tolist() == [20, 20]
