"""Bad input, bad destinations and dying processes: one line that names the thing, and nothing left behind."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loaders import beton
from loaders.convert import convert
from loaders.convert.pool import map_samples
from loaders.convert.run import open_source
from loaders.convert.source import Sample, Source
from loaders.errors import DataError
from loaders.manifest import check_opening, manifest_path

ROOT = Path(__file__).resolve().parents[2]


def noise(kind: str = "JPEG", side: int = 80, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise())
    return folder


def run(source: Path, dest: Path, **options: object) -> object:
    return convert(str(source), dest, progress=False, **({"workers": 1} | options))  # type: ignore[arg-type]


def refused(source: Path, dest: Path, message: str, **options: object) -> str:
    """The one line with which a conversion is refused; nothing new may be in the destination's folder."""
    before = sorted(dest.parent.iterdir()) if dest.parent.is_dir() else []
    with pytest.raises(DataError, match=message) as caught:
        run(source, dest, **options)
    assert "\n" not in str(caught.value)
    assert before == (sorted(dest.parent.iterdir()) if dest.parent.is_dir() else [])
    return str(caught.value)


BAD = {
    "undecodable": (noise("PNG")[:60] + b"\xff" * 500, "cannot be decoded|is not an image"),
    "truncated-jpeg": (noise()[:-700], "is a damaged JPEG: Premature end|is a damaged JPEG: .*truncated"),
    "truncated-png": (noise("PNG")[:-5000], "cannot be decoded: .*truncated"),
    "empty": (b"", "is empty"),
    "not-an-image": (b"class,count\ncat,3\n", "is not an image"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_bad_image_fails(images: Path, tmp_path: Path, kind: str, workers: int) -> None:
    data, reason = BAD[kind]
    (images / "a" / "bad.jpg").write_bytes(data)
    line = refused(images, tmp_path / "x.beton", reason, workers=workers)
    assert line.startswith(f"{images / 'a' / 'bad.jpg'}: ") and line.endswith("or use --on-error skip")


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_skipped_and_listed(images: Path, tmp_path: Path, kind: str) -> None:
    data, reason = BAD[kind]
    (images / "a" / "bad.jpg").write_bytes(data)
    run(images, tmp_path / "x.beton", on_error="skip")
    manifest = check_opening(tmp_path / "x.beton")
    assert manifest.num_samples == 3 and manifest.class_counts == (2, 1)
    (skipped,) = manifest.skipped
    assert skipped["name"] == str(images / "a" / "bad.jpg")
    assert any(part in skipped["reason"] for part in reason.replace(".*", "|").split("|"))


def test_all_images_bad(images: Path, tmp_path: Path) -> None:
    for path in images.glob("*/*"):
        path.write_bytes(b"")
    refused(
        images,
        tmp_path / "x.beton",
        r"no image could be stored; the first: .*1\.jpg is empty",
        on_error="skip",
    )


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    refused(tmp_path / "images", tmp_path / "x.beton", "images: is empty; an image folder holds")


def test_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(noise())
    refused(tmp_path / "images", tmp_path / "x.beton", "images: has files but no class folders")


def test_class_without_files(images: Path, tmp_path: Path) -> None:
    (images / "c").mkdir()
    refused(images, tmp_path / "x.beton", "images/c: this class folder has no files")


def test_source_that_grows_meanwhile(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_of_three(*arguments: str, **options: Any) -> Source:
        return replace(open_source(*arguments, **options), num_samples=2)

    monkeypatch.setattr("loaders.convert.run.open_source", two_of_three)
    refused(images, tmp_path / "x.beton", "images: grew meanwhile; convert again")


def test_unknown_source(tmp_path: Path) -> None:
    refused(tmp_path / "none", tmp_path / "x.beton", "none: no such file or folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": -1}, "--workers -1"), ({"on_error": "ignore"}, "--on-error ignore: not one of fail, skip")],
)
def test_bad_options(images: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    refused(images, tmp_path / "x.beton", message, **options)


def test_existing_destination(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "x.beton"
    dest.write_text("mine")
    refused(images, dest, r"x\.beton: exists; .*--overwrite")
    assert dest.read_text() == "mine"
    run(images, dest, overwrite=True)
    assert check_opening(dest).num_samples == 3


def test_failed_overwrite_keeps_what_was_there(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "x.beton"
    run(images, dest)
    before = dest.read_bytes(), manifest_path(dest).read_bytes()
    (images / "b" / "bad.jpg").write_bytes(b"")
    refused(images, dest, "is empty", overwrite=True)
    assert before == (dest.read_bytes(), manifest_path(dest).read_bytes())


def test_destination_that_cannot_be_made(images: Path, tmp_path: Path) -> None:
    refused(images, tmp_path / "none" / "x.beton", "none: is not a folder that exists; make it first")
    refused(images, images / "a" / "1.jpg" / "x.beton", r"1\.jpg: is not a folder that exists")
    refused(images, images, r"images: is a folder; give the name of the file")
    refused(images, tmp_path / ("x" * 252), "cannot be a file .File name too long")
    refused(images, tmp_path / ("x" * 300), "cannot be a file .File name too long")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_folder_where_nobody_may_write(images: Path) -> None:
    with pytest.raises(
        DataError, match=r"^/proc: cannot be written to \(.*\); free some space or choose another"
    ):
        run(images, Path("/proc/x.beton"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(images: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    refused(images, locked / "x.beton", "locked: cannot be written to .*Permission denied")


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_full_disk(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(beton.BetonWriter, "add", wrap_write(beton.BetonWriter.add, full))
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "link", full)
    refused(images, tmp_path / "x.beton", "cannot be written to .No space left on device.; free some space")


def wrap_write(add: Callable[..., None], full: Callable[..., None]) -> Callable[..., None]:
    """`add` on a file whose `write` fails."""

    class Full:
        def __init__(self, file: object) -> None:
            self.close = file.close  # type: ignore[attr-defined]
            self.write = full

    def add_to_full(self: beton.BetonWriter, *arguments: object) -> None:
        self._file = Full(self._file)  # type: ignore[assignment]
        add(self, *arguments)

    return add_to_full


def script(body: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs `body` with `convert` imported."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys\nfrom loaders.convert import convert\n{body}",
            *map(str, arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_system_refuses_to_write_more(images: Path, tmp_path: Path) -> None:
    """A real failing write, in the midst of buffered data: the limit on file size."""
    for index in range(200):
        os.link(images / "a" / "1.jpg", images / "a" / f"more{index}.jpg")
    process = script(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "from pathlib import Path\n"
        "convert(sys.argv[1], Path(sys.argv[2]), workers=1, progress=False)",
        images,
        tmp_path / "x.beton",
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"DataError: {tmp_path}: cannot be written to (File too large)" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def descendants(pid: int) -> dict[int, int]:
    """The processes below `pid` and the generation of each: 1 = child, 2 = grandchild."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
    generations = {pid: 0}
    for _ in range(3):
        generations |= {
            child: generations[parent] + 1
            for child, parent in parents.items()
            if parent in generations and child not in generations
        }
    return generations


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["worker killed", "interrupted"])
def test_a_conversion_that_is_struck_ends_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "0.png").write_bytes(noise("PNG", 1400, compress_level=1))
    for index in range(1, 400):  # half a minute's work
        os.link(tmp_path / "in" / "a" / "0.png", tmp_path / "in" / "a" / f"{index}.png")
    process = script(
        "from pathlib import Path\nconvert(sys.argv[1], Path(sys.argv[2]), workers=2, progress=False)",
        tmp_path / "in",
        tmp_path / "x.beton",
    )
    deadline = time.monotonic() + 60
    workers: list[int] = []
    while len(workers) < 2 or not list(tmp_path.glob(".x.beton.part")):
        assert process.poll() is None and time.monotonic() < deadline
        workers = [child for child, generation in descendants(process.pid).items() if generation == 2]
        time.sleep(0.05)
    everyone = set(descendants(process.pid)) - {process.pid}
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" if how == "interrupted" else "DataError: a worker process died") in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    while any(Path(f"/proc/{pid}").exists() for pid in everyone):
        assert time.monotonic() < deadline, "a worker outlived the conversion"
        time.sleep(0.05)


def struck(sample: Sample) -> str:
    if sample.name == "40":
        os.kill(os.getpid(), signal.SIGKILL)
    return sample.name


def raising(sample: Sample) -> str:
    if sample.name == "40":
        raise RuntimeError("a mistake in the program")
    return sample.name


def test_a_worker_that_dies_or_raises_never_hangs_the_pool() -> None:
    samples = [Sample(str(index), 0, bytes(1 << 18)) for index in range(80)]
    with pytest.raises(DataError, match="a worker process died"):
        list(map_samples(struck, samples, num_workers=2))
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        list(map_samples(raising, samples, num_workers=2))


def name_of(sample: Sample) -> str:
    return sample.name


def test_the_pool_keeps_order_and_reads_no_further_than_it_must() -> None:
    num_read = 0

    def stream() -> object:
        nonlocal num_read
        for index in range(500):
            num_read += 1
            yield Sample(str(index), 0, bytes(1 << 18))

    results = map_samples(name_of, stream(), num_workers=2)  # type: ignore[arg-type]
    first = next(results)
    assert first[1] == "0" and num_read <= 20  # four messages of 1 MiB and the next sample
    assert [result for _, result in results] == [str(index) for index in range(1, 500)]


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, workers: int) -> None:
    peaks_mib = []
    for num_images in (150, 1200):
        folder = tmp_path / f"in{num_images}" / "a"
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(noise(side=250, quality=95))
        for index in range(1, num_images):
            os.link(folder / "0.jpg", folder / f"{index}.jpg")
        process = script(
            "import resource\nfrom pathlib import Path\n"
            "m = convert(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False)\n"
            "print(m.num_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
            folder.parent,
            tmp_path / f"{num_images}.beton",
            workers,
        )
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        num_bytes, peak_kib = map(int, output.split())
        peaks_mib.append(peak_kib / 1024)
    assert num_bytes > 80 << 20
    assert peaks_mib[1] - peaks_mib[0] < 16, peaks_mib
