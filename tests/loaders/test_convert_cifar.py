"""Crafted archives of CIFAR-10: each ends in one line, soon and in little memory, and runs no code."""

import gzip
import io
import os
import pickle
import pickletools
import resource
import struct
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loaders.convert import cifar
from loaders.convert.plain_pickle import PickleError, read_plain_pickle
from loaders.convert.run import open_source
from loaders.errors import DataError

NAMES = {b"label_names": [f"c{number}".encode() for number in range(10)]}
BATCH = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """No input here may take more than 20 s of the processor, nor 1 GiB more than there was."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    start = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < 20


# The pickles


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
def test_values_come_as_they_went_in(protocol: int) -> None:
    values = {"labels": [0, 1, 255, 256, -1, 70_000, None, True], "names": ["a", "é"], "pair": (1, (2,), ())}
    if protocol > 1:  # before, numbers over four bytes and truth values are text
        values["large"] = 1 << 70
    else:
        values["labels"] = [0, 1, 255, 256, -1, 70_000, None]
    assert read_plain_pickle(pickle.dumps(values, protocol)) == values


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_as_they_went_in(protocol: int, order: str) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8), order=order)  # type: ignore[call-overload]
    found = read_plain_pickle(pickle.dumps({b"data": array}, protocol))["data"]
    np.testing.assert_array_equal(found, array)


def python2_batch() -> bytes:
    """A batch as cPickle of Python 2 wrote it, protocol 2, with numpy of that time."""
    pixels = bytes(range(256)) * 24
    return (
        b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x06K\x09eU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
        b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01"
        b"\x87Rq\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x18\x00\x00"
        + pixels
        + b"tbu."
    )


def test_a_batch_of_python_2() -> None:
    values = read_plain_pickle(python2_batch())
    assert values["labels"] == [6, 9]
    assert values["data"].shape == (2, 3072) and values["data"][1, 5] == 5
    loaded = pickle.loads(python2_batch(), encoding="bytes")
    np.testing.assert_array_equal(values["data"], loaded[b"data"])


def test_every_cut_and_every_flip_is_an_error_or_a_dictionary() -> None:
    data = pickle.dumps({b"labels": [1, 2, 300], b"data": np.zeros((2, 3), np.uint8), b"names": ["a"]}, 4)
    num_errors = 0
    changed = [data[:length] for length in range(len(data))]
    for place in range(len(data)):
        changed += [data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :] for bit in range(8)]
    for one in changed:
        try:
            read_plain_pickle(one)
        except PickleError as error:
            num_errors += 1
            message = str(error)
            message.encode()
            assert "\n" not in message and len(message) < 400
    assert num_errors > len(data)


def nested(opening: bytes, closing: bytes, depth: int = 100_000) -> bytes:
    return b"\x80\x02" + opening * depth + closing * depth + b"."


def doubling() -> bytes:
    """A tuple of two tuples of two tuples ..., as a key of a dictionary: 2^200 tuples to be hashed."""
    return b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 200 + b"K\x01s."


CRAFTED = {
    "nested lists": nested(b"](", b"e"),
    "nested tuples": nested(b"", b"\x85").replace(b"\x80\x02", b"\x80\x02K\x01"),
    "nested dictionaries": nested(b"}U\x01a", b"s"),
    "a list within itself": b"\x80\x02]q\x00h\x00a.",
    "tuples that double": doubling(),
    "an enormous place in the memory": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "an enormous number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 24) + b"\x7f" * (1 << 24) + b".",
    "a number that claims to be enormous": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff\x01.",
    "text that claims to be enormous": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "bytes that claim to be enormous": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "a frame that claims to be enormous": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "instructions without end": b"\x80\x02" + b"N0" * 500_000 + b".",
    "numbers without end": b"\x80\x02](" + b"N" * 500_000 + b"e.",
    "an empty stack": b"\x80\x02a.",
    "no mark": b"\x80\x02]e.",
    "nothing remembered": b"\x80\x02h\x07.",
    "no dictionary": pickle.dumps([1], 2),
    "a key that is no text": pickle.dumps({(1, 2): 3}, 2),
    "text that is not UTF-8": b"\x80\x02}U\x01\xffK\x01s.",
    "an extension": b"\x80\x02\x82\x01.",
    "something persistent": b"\x80\x02U\x01aQ.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "a call": b"\x80\x02cos\nsystem\nU\x04true\x85R.",
    "a call of what is no function": b"\x80\x02]U\x01a\x85R.",
    "a state of what is no array": b"\x80\x02]}b.",
    "nothing": b"",
}
ARRAYS = {
    "objects": np.array([None, 1]),
    "floats": np.zeros(4),
    "records": np.zeros(2, [("a", "u1"), ("b", "u1", (3,))]),
}
STATES = {
    "a shape of other size": (1, (10**9, 3072), "u1", False, b"xx"),
    "a shape that overflows": (1, (1 << 70, 1 << 70), "u1", False, b""),
    "a negative shape": (1, (-1, -1), "u1", False, b"xxxx"),
    "a shape of too many sides": (1, (1,) * 100, "u1", False, b"x"),
    "a shape of text": (1, "ab", "u1", False, b"x"),
    "no bytes": (1, (2,), "u1", False, [1, 2]),
    "too few parts": (1, (2,)),
    "no parts": 3,
}


def with_state(state: object) -> bytes:
    """A pickle whose array has this state; "u1" stands for numpy's type."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    body = pickle.dumps(state, 2)[2:-1]
    for old in (b"X\x02\x00\x00\x00u1q\x02", b"X\x02\x00\x00\x00u1q\x03", b"X\x02\x00\x00\x00u1q\x01"):
        body = body.replace(old, dtype)
    return b"\x80\x02}U\x04data" + array + body + b"bs."


@pytest.mark.parametrize("kind", [*CRAFTED, *ARRAYS, *STATES])
def test_crafted_pickles_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    if kind in CRAFTED:
        data = CRAFTED[kind]
    elif kind in ARRAYS:
        data = pickle.dumps({b"data": ARRAYS[kind]}, 4)
    else:
        data = with_state(STATES[kind])
        pickletools.dis(data, io.StringIO())  # a whole pickle
    with pytest.raises(PickleError) as caught:
        read_plain_pickle(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    folder = tmp_path / cifar.FOLDER
    folder.mkdir()
    (folder / "batches.meta").write_bytes(data)
    with pytest.raises(
        DataError, match=r"batches\.meta is damaged, or not of CIFAR-10 \(.*\); fetch it again"
    ):
        open_source(str(tmp_path), "train", quality=90, progress=False)


@pytest.mark.parametrize("names", [[b"\xff"], ["a\nb"], ["x" * 2000], [3], "text", None])
def test_class_names_that_are_none_are_refused(tmp_path: Path, names: object) -> None:
    folder = tmp_path / cifar.FOLDER
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 4))
    with pytest.raises(DataError, match=r"class 0|class name|label_names"):
        open_source(str(tmp_path), "train", quality=90, progress=False)


# The archives


def archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member, data in members:
            file.addfile(member, io.BytesIO(data))
    return path


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
    info.size = len(data)
    return info, data


def zeros(path: Path, head: bytes, num_bytes: int) -> Path:
    """An archive whose first header is followed by so many zeros."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(num_bytes >> 20):
            file.write(bytes(1 << 20))
    return path


def claims(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def refused(path: Path) -> str:
    with pytest.raises(DataError, match="cannot be read from this CIFAR-10 python archive") as caught:
        open_source(str(path), "train", quality=90, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cifar-10-batches-py/batches.meta", tarfile.REGTYPE),
        ("before", tarfile.REGTYPE),
        ("longname", tarfile.GNUTYPE_LONGNAME),
        ("pax", tarfile.XHDTYPE),
    ],
)
def test_a_bomb_is_not_unpacked(tmp_path: Path, name: str, kind: bytes) -> None:
    """100 MB of zeros behind a header that claims 100 GB, in 400 KB."""
    path = zeros(tmp_path / "x.tar.gz", claims(name, 100 << 30, kind), 100 << 20)
    assert " claims " in refused(path) and path.stat().st_size < 1 << 20


def test_a_bomb_of_headers_is_not_read_to_its_end(tmp_path: Path) -> None:
    empty = claims("empty", 0)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(empty * 50_000, 1))
    assert "batches.meta is missing" in refused(path)


def test_a_chain_of_headers_does_not_recurse(tmp_path: Path) -> None:
    """Each long name is followed by the header that it names; here by another long name."""
    one = claims("long", 100, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512, b"\0")
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(one * 20_000, 1))
    refused(path)


def test_a_link_is_no_batch(tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{cifar.FOLDER}/batches.meta")
    info.type, info.linkname = tarfile.SYMTYPE, f"{cifar.FOLDER}/batches.meta"
    assert "batches.meta is missing" in refused(archive(tmp_path / "x.tar.gz", [(info, b"")]))


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "test_batch")
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(NAMES, 4))
    source = open_source(str(tmp_path), "test", quality=90, progress=False)
    with pytest.raises(DataError, match="test_batch"):
        list(source.samples())


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
def test_an_archive_packed_or_not(tmp_path: Path, suffix: str) -> None:
    members = [member("batches.meta", pickle.dumps(NAMES, 4)), member("test_batch", pickle.dumps(BATCH, 4))]
    path = archive(tmp_path / "x.tar.gz", members)
    if suffix == ".tar":
        path = tmp_path / "x.tar"
        path.write_bytes(gzip.decompress((tmp_path / "x.tar.gz").read_bytes()))
    source = open_source(str(path), "test", quality=90, progress=False)
    assert [sample.label for sample in source.samples()] == [0, 1, 2, 3]
