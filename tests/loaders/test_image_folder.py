"""One listing of an image folder, for the conversion and the loaders: links, names, splits, and what is refused."""

import errno
import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import photograph

from loaders.convert import convert
from loaders.convert.encode import EncodeOptions, encode_sample
from loaders.convert.pool import map_samples
from loaders.convert.run import open_source
from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.images import open_beton, open_folder
from loaders.manifest import Manifest, check_opening


def encoded(kind: str = "PNG", side: int = 20, seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    photograph(seed, side, side + 10).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images each."""
    path = tmp_path / "images"
    for number, name in enumerate(("a/0.png", "a/1.png", "b/2.png", "b/3.png")):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(seed=number))
    return path


def samples(path: Path, split: str = "train") -> list[tuple[str, int]]:
    """Paths within the folder and labels, as conversion reads them."""
    source = open_source(str(path), split, quality=90, progress=False)
    found = [(os.path.relpath(sample.name, path), sample.label) for sample in source.samples()]
    assert len(found) == source.num_samples
    return found


def both_refuse(path: Path, message: str) -> None:
    """The conversion and the folder loaders refuse it with the same line."""
    for open_it in (samples, open_folder):
        with pytest.raises(DataError, match=message) as caught:
            open_it(path)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


# Links


def test_a_link_to_a_folder_of_images_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.png").write_bytes(encoded(seed=4))
    (folder / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    expected = [
        ("a/0.png", 0),
        ("a/1.png", 0),
        ("a/more/4.png", 0),
        ("b/2.png", 1),
        ("b/3.png", 1),
        ("c/4.png", 2),
    ]
    assert samples(folder) == expected
    opened = open_folder(folder)
    assert [
        (os.path.relpath(file, folder), label)
        for file, label in zip(opened.files, opened.labels, strict=True)
    ] == expected


@pytest.mark.parametrize("target", ["a", "images", "a/deep", "itself"])
def test_a_circle_of_links_is_refused_by_name(folder: Path, target: str) -> None:
    (folder / "a" / "deep").mkdir()
    targets = {"a": folder / "a", "images": folder, "a/deep": folder / "a" / "deep", "itself": Path("round")}
    (folder / "a" / "deep" / "round").symlink_to(targets[target])
    both_refuse(
        folder, "a/deep/round: (is a link to a folder that it stands in|cannot be read .Too many levels)"
    )


def test_two_links_to_one_folder_are_no_circle(folder: Path) -> None:
    (folder / "a" / "x").symlink_to(folder / "b")
    (folder / "a" / "y").symlink_to(folder / "b")
    assert [label for _, label in samples(folder)] == [0] * 6 + [1] * 2


def test_a_class_that_is_a_dangling_link_is_refused(folder: Path, tmp_path: Path) -> None:
    """Left out, it would shift the labels of all classes behind it."""
    (folder / "aa").symlink_to(tmp_path / "gone")
    both_refuse(folder, r"images/aa: is a link to .*gone, which is not there; restore or remove it")


def test_a_file_that_is_a_dangling_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "9.png").symlink_to(tmp_path / "gone.png")
    message = r"images/a/9\.png: .*is a link to .*gone\.png, which is not there"
    with pytest.raises(DataError, match=message):
        convert(str(folder), tmp_path / "x.beton", workers=1, progress=False)
    with pytest.raises(DataError, match=message):
        open_folder(folder)
    manifest = convert(str(folder), tmp_path / "x.beton", workers=1, progress=False, on_error="skip")
    assert [skipped["name"] for skipped in manifest.skipped] == [str(folder / "a" / "9.png")]


# Names


def test_a_class_name_that_is_not_utf8_is_refused_before_any_work(folder: Path) -> None:
    os.rename(folder / "b", os.fsencode(folder) + b"/b\xff")
    both_refuse(folder, r"the name of class 1, 'b\\xff', is not UTF-8 .*; rename it")


def test_a_class_name_with_a_newline_is_refused(folder: Path) -> None:
    (folder / "b").rename(folder / "b\nc")
    both_refuse(folder, r"the name of class 1, 'b\\nc', .*holds control characters; rename it")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_skipped_file_whose_name_is_not_utf8_is_listed_escaped(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    names = [os.fsencode(folder / "a") + b"/bad\xff\n.png", os.fsencode(folder / "a") + b"/" + b"x" * 255]
    for name in names:
        with open(name, "wb") as file:
            file.write(b"no image")
    with pytest.raises(DataError, match=r"a/bad\\xff\\n\.png: is not an image"):
        convert(str(folder), tmp_path / "x.beton", workers=workers, progress=False)
    convert(str(folder), tmp_path / "x.beton", workers=workers, progress=False, on_error="skip")
    manifest: Manifest = check_opening(tmp_path / "x.beton")
    assert [skipped["name"] for skipped in manifest.skipped] == [
        f"{folder}/a/bad\\xff\\n.png",
        f"{folder}/a/{'x' * 255}",
    ]


def test_a_folder_whose_own_name_is_not_utf8_is_stored_escaped(folder: Path, tmp_path: Path) -> None:
    os.rename(folder, os.fsencode(tmp_path) + b"/\xe9\n")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\n")
    assert convert(path, tmp_path / "x.beton", workers=1, progress=False).source.endswith(r"/\xe9\n")
    assert check_opening(tmp_path / "x.beton").num_samples == 4


# Splits


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    path = tmp_path / "splits"
    for number, name in enumerate(("train", "val", "validation", "train_extra")):
        (path / name / "cat").mkdir(parents=True)
        (path / name / "cat" / f"{number}.png").write_bytes(encoded(seed=number))
    return path


@pytest.mark.parametrize("split", ["train", "val", "validation", "train_extra"])
def test_every_split_that_is_there_can_be_named(splits: Path, split: str) -> None:
    ((name, label),) = samples(splits, split)
    assert name.startswith(f"{split}/cat/") and label == 0


def test_a_split_that_is_not_there_is_refused(splits: Path, folder: Path) -> None:
    with pytest.raises(
        DataError, match="has no split 'test'; its folders are train, train_extra, val, validation"
    ):
        samples(splits, "test")
    with pytest.raises(
        DataError, match="has no split 'test'; its folders are a, b: if they are classes, leave"
    ):
        samples(folder, "test")


def test_a_class_called_train_is_no_split(folder: Path) -> None:
    (folder / "a").rename(folder / "train")
    assert [label for _, label in samples(folder)] == [0, 0, 1, 1]


def test_a_loader_over_a_folder_of_splits_says_so(splits: Path) -> None:
    with pytest.raises(DataError, match="splits: holds splits and not classes; give one of train, "):
        open_folder(splits)


# The same images in the loaders as in the conversion


def test_loaders_see_the_images_that_conversion_stores(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a/upright.jpg": encoded("JPEG"),
        "a/turned.jpg": encoded("JPEG", exif=exif),
        "a/turned.tif": encoded("TIFF", exif=exif),
        "a/no_extension": encoded("PNG"),
        "b/deep/turned.png": encoded("PNG", exif=exif),
        "b/movie.gif": encoded("GIF"),
        "b/.hidden.png": b"no image",
        ".git/not_a_class.png": b"no image",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    grey = photograph(1, 20, 30).convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) << 8).save(folder / "b" / "sixteen.png")
    manifest = convert(str(folder), tmp_path / "x.beton", workers=1, encoding="raw", progress=False)
    opened = open_folder(folder)
    assert opened.class_names == manifest.class_names == ("a", "b")
    assert len(opened.files) == manifest.num_samples == 7
    stored = open_beton(tmp_path / "x.beton")
    assert opened.labels.tolist() == stored.labels.tolist()
    for index in range(7):
        assert (opened.heights[index], opened.widths[index]) == (stored.heights[index], stored.widths[index])
        np.testing.assert_array_equal(opened.image(index), stored.image(index))
    plain = {file.name for file, is_plain in zip(opened.files, opened.plain, strict=True) if is_plain}
    assert plain == {"upright.jpg", "no_extension"}


def test_a_loader_names_what_is_no_image_as_conversion_does(folder: Path) -> None:
    (folder / "a" / "labels.csv").write_text("class,count\n")
    with pytest.raises(
        DataError, match=r"a/labels\.csv: does not decode as an image \(is not an image|none of JPEG"
    ):
        open_folder(folder)


def test_an_image_that_is_replaced_while_the_folder_is_open_is_named(folder: Path) -> None:
    opened = open_folder(folder)
    (folder / "a" / "1.png").write_bytes(encoded(side=40))
    with pytest.raises(DataError, match=r"a/1\.png: is 50x40 and was 30x20 when it was opened"):
        opened.image(1)


def test_exif_data_behind_the_pixels_is_noticed(folder: Path) -> None:
    """A PNG may tell its orientation at its very end, where opening a folder does not look."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(exif=exif)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    (folder / "a" / "1.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    with pytest.raises(DataError, match=r"a/1\.png: is 20x30 and was 30x20 .*convert the folder"):
        open_folder(folder).image(1)


# Folders that change or cannot be read


def test_files_that_vanish_meanwhile_are_noticed(folder: Path) -> None:
    source = open_source(str(folder), "train", quality=90, progress=False)
    (folder / "b" / "3.png").unlink()
    with pytest.raises(DataError, match="images/b: had 2 files at first and has 1 now"):
        list(source.samples())


def fail_for(name: str, function: Callable[..., object], error: int) -> Callable[..., object]:
    """`function`, which fails for what is called `name`."""

    def failing(path: object, *arguments: object, **options: object) -> object:
        if str(path).endswith(name):
            raise OSError(error, os.strerror(error), str(path))
        return function(path, *arguments, **options)

    return failing


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_cannot_be_read_ends_the_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, on_error: str
) -> None:
    """`skip` is for damaged images; a disk that fails says nothing of them, and must not leave them out."""
    monkeypatch.setattr(Path, "read_bytes", fail_for("1.png", Path.read_bytes, error))
    with pytest.raises(DataError, match=rf"a/1\.png: cannot be read \({os.strerror(error)}\)"):
        convert(str(folder), tmp_path / "x.beton", workers=1, progress=False, on_error=on_error)  # type: ignore[arg-type]
    assert not (tmp_path / "x.beton").exists()


def test_a_worker_names_the_file_that_it_cannot_read(folder: Path) -> None:
    gone = [Sample("it", 0, folder / "a" / f"{number}.png") for number in range(100)]
    work = partial(encode_sample, options=EncodeOptions(max_side=None, quality=90, encoding="auto"))
    with pytest.raises(DataError, match=r"a/2\.png: cannot be read \(No such file or directory\)"):
        list(map_samples(work, gone, num_workers=2))


@pytest.mark.parametrize("name", ["images", "b"])
def test_a_folder_that_cannot_be_listed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "scandir", fail_for(f"/{name}", os.scandir, errno.EIO))
    both_refuse(folder, f"{name}: cannot be read .Input/output error")
