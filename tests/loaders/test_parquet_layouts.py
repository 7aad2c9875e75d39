"""Parquet files: which make up a split, whether they are all there, and what they may claim."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.convert import convert
from loaders.convert.run import open_source
from loaders.errors import DataError
from loaders.images import open_beton

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, label: int = 0, *, names: object = None, images: list[object] | None = None) -> None:
    """A file of one row, or of `images`, all of one label."""
    images = images or [{"bytes": picture(label % 256), "path": None}]
    table = pa.table({"image": images, "label": pa.array([label] * len(images), pa.int64())})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def labels(source: Path | str, split: str = "train") -> list[int]:
    return [sample.label for sample in open_source(str(source), split, quality=90, progress=False).samples()]


def refused(source: Path | str, message: str, split: str = "train") -> None:
    with pytest.raises(DataError, match=message) as caught:
        labels(source, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "-0123456789abcdef"])
def test_a_missing_shard_is_named(tmp_path: Path, end: str) -> None:
    for number in (0, 2):
        write(tmp_path / f"train-{number:05}-of-00003{end}.parquet", number)
    missing = rf"/train-00001-of-00003{end}\.parquet: is missing"
    refused(tmp_path, missing)
    refused(f"{tmp_path}/train-*.parquet", missing)
    assert labels(f"{tmp_path}/train-00000-*.parquet") == [0]
    assert labels(tmp_path / f"train-00002-of-00003{end}.parquet") == [2]
    write(tmp_path / f"train-00001-of-00003{end}.parquet", 1)
    assert labels(tmp_path) == [0, 1, 2]


def test_the_last_shards_may_be_missing_too(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.parquet")
    write(tmp_path / "train-00001-of-00003.parquet")
    refused(tmp_path, "/train-00002-of-00003.parquet: is missing")


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2)])
def test_a_missing_number_is_named(tmp_path: Path, numbers: tuple[int, int]) -> None:
    for number in numbers:
        write(tmp_path / "default" / "train" / f"{number:04}.parquet")
    refused(tmp_path, f"/default/train/{({0, 1, 2} - set(numbers)).pop():04}.parquet: is missing")


@pytest.mark.parametrize(
    "others", [["train-00000-of-00002", "train-00001-of-00002"], ["train"], ["cifar10-train-00000-of-00001"]]
)
def test_two_series_of_one_split_are_refused(tmp_path: Path, others: list[str]) -> None:
    for name in ("train-00000-of-00001", *others):
        write(tmp_path / f"{name}.parquet")
    refused(tmp_path, "seems to hold again what .* is a part of; remove one")


def test_shards_with_other_class_names_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"train-0000{number}-of-00002.parquet" for number in (0, 1))
    write(first, names=["a", "b"])
    write(second, names=["b", "a"])
    refused(tmp_path, f"{second}: its class names are not those of {first} .0 is 'a' there and 'b' here")
    write(second)
    refused(tmp_path, f"{second}: its class names are not those of {first} .one of the two has none")
    write(second, names=["a", "b", "c"])
    refused(tmp_path, f"{second}: its class names are not those of {first} .2 there and 3 here")
    write(second, names=["a", "b"])
    assert labels(tmp_path) == [0, 0]


def test_a_split_is_exactly_its_name(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", 1)
    write(tmp_path / "train_extra-00000-of-00001.parquet", 2)
    write(tmp_path / "validation-00000-of-00001.parquet", 3)
    assert labels(tmp_path) == [1]
    assert labels(tmp_path, "train_extra") == [2]
    assert labels(tmp_path, "validation") == [3]
    refused(tmp_path, "no parquet files of split 'val'; give one of train, train_extra, validation", "val")


def test_names_that_only_begin_with_a_split_are_not_taken_for_it(tmp_path: Path) -> None:
    write(tmp_path / "train_a.parquet")
    write(tmp_path / "train_b.parquet")
    refused(
        tmp_path, "no parquet files of split 'train'; give one of train_a, train_b with --split, or a pattern"
    )
    assert labels(f"{tmp_path}/train_*.parquet") == [0, 0]


def test_several_series_that_are_no_usual_split_have_to_be_named(tmp_path: Path) -> None:
    write(tmp_path / "summer-00000-of-00001.parquet", 1)
    write(tmp_path / "winter-00000-of-00001.parquet", 2)
    refused(tmp_path, "no parquet files of split 'train'; give one of summer, winter")
    assert labels(tmp_path, "winter") == [2]


@pytest.mark.parametrize(
    "layout",
    [
        "{split}-00000-of-00001",
        "data/{split}-00000-of-00001",
        "data/{split}-00000-of-00001-0123456789abcdef",
        "plain_text/{split}-00000-of-00001",
        "default/{split}/0000",
        "{split}/0000",
        "{split}/part-0",
        "{split}/anything",
        "cifar10-{split}",
        "plain_text/cifar10-{split}-00000-of-00001",
    ],
)
def test_layouts_of_the_hub(tmp_path: Path, layout: str) -> None:
    for label, split in enumerate(("train", "test", "validation")):
        write(tmp_path / f"{layout.format(split=split)}.parquet", label)
    (tmp_path / "README.md").write_text("hello")
    for label, split in enumerate(("train", "test", "validation")):
        assert labels(tmp_path, split) == [label]


def test_several_configurations_have_to_be_named(tmp_path: Path) -> None:
    for name in ("small", "large"):
        write(tmp_path / name / "train" / "0000.parquet")
    refused(tmp_path, "holds several configurations; give the folder of one as the source: large, small")
    assert labels(tmp_path / "small") == [0]


def test_parquet_among_images_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a" / "train-00000-of-00001.parquet")
    (tmp_path / "in" / "a" / "1.png").write_bytes(picture())
    with pytest.raises(
        DataError, match=r"\.parquet: is not an image \(it is parquet; give its folder as the source"
    ):
        convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1, progress=False)


def test_images_that_stand_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "0.png").write_bytes(picture(7))
    rows: list[object] = [{"bytes": None, "path": "images/0.png"}, {"bytes": picture(9), "path": "none.png"}]
    write(tmp_path / "in" / "x.parquet", images=rows)
    convert(str(tmp_path / "in" / "x.parquet"), tmp_path / "x.beton", workers=1, progress=False)
    opened = open_beton(tmp_path / "x.beton")
    assert [opened.image(index).getpixel((0, 0)) for index in (0, 1)] == [(7, 7, 7), (9, 9, 9)]
    write(tmp_path / "in" / "x.parquet", images=rows[:1])  # no row has bytes
    assert labels(tmp_path / "in" / "x.parquet") == [0]


@pytest.mark.parametrize("name", ["none.png", "/etc/hostname", "../0.png"])
def test_missing_bytes_are_named(tmp_path: Path, name: str) -> None:
    """Whoever wrote the file does not decide what else is read here."""
    (tmp_path / "0.png").write_bytes(picture())
    write(
        tmp_path / "in" / "x.parquet",
        images=[{"bytes": picture(), "path": None}, {"bytes": None, "path": name}],
    )
    with pytest.raises(DataError, match=r"x\.parquet: row 1: has no bytes, and its path .* is no file below"):
        convert(str(tmp_path / "in"), tmp_path / "x.beton", workers=1, progress=False, on_error="skip")


def varint(value: int) -> bytes:
    """A signed number in Thrift's compact protocol."""
    value = value << 1 ^ value >> 63
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_a_file_that_claims_five_gigabytes_is_refused(tmp_path: Path) -> None:
    """Each number of the footer in turn is replaced by 5 billion: no memory is asked for, no row invented."""
    path = tmp_path / "x.parquet"
    write(path, images=[picture(shade) for shade in range(100)])
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    body, footer = whole[: -8 - length], whole[-8 - length : -8]
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(0).column(0)
    sizes = {
        100,
        column.total_compressed_size,
        column.total_uncompressed_size,
        metadata.row_group(0).total_byte_size,
    }
    claims = []
    for size in sizes:
        place = footer.find(varint(size))
        while place >= 0:
            changed = footer[:place] + varint(5_000_000_000) + footer[place + len(varint(size)) :]
            path.write_bytes(body + changed + len(changed).to_bytes(4, "little") + whole[-4:])
            claims.append(refusal(path))
            place = footer.find(varint(size), place + 1)
    assert sum("it claims" in claim for claim in claims) >= 4, claims


def refusal(path: Path) -> str:
    """Why a file is refused; or "", and it is the 100 rows that it was."""
    try:
        found = labels(path)
    except DataError as error:
        return str(error)
    assert found == [0] * 100
    return ""


def test_a_label_that_claims_billions_of_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", 5_000_000_000, images=[{"bytes": picture(), "path": None}])
    refused(tmp_path / "x.parquet", "label 5000000000 has no name, and over 1,000,000 classes are too many")


@pytest.mark.parametrize("names", ["text", 3, [1, 2], {"a": 0}])
def test_class_names_that_are_none_are_refused(tmp_path: Path, names: object) -> None:
    write(tmp_path / "x.parquet", names=names)
    refused(tmp_path / "x.parquet", r"x\.parquet: the class names in its metadata are no list of text")


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "x" * 2000])
def test_class_names_that_no_manifest_could_hold_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.parquet", names=[name])
    refused(tmp_path / "x.parquet", r"x\.parquet: the name of class 0")
