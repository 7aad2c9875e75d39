"""How a conversion gets its name: at any moment there is an old pair or a new pair, and nothing else is replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.convert import convert, publish
from loaders.convert.pool import map_samples
from loaders.convert.source import Sample
from loaders.errors import DataError
from loaders.images import open_beton
from loaders.manifest import check_opening, manifest_path, next_manifest_path, verify
from loaders.waiting import MAX_WAIT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]


def folder_of(path: Path, *, level: int, names: tuple[str, str] = ("a", "b")) -> str:
    """Two classes with two images each, all of one grey."""
    for name in names:
        (path / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path / name / f"{index}.png")
    return str(path)


@pytest.fixture
def old(tmp_path: Path) -> str:
    return folder_of(tmp_path / "old", level=10)


@pytest.fixture
def new(tmp_path: Path) -> str:
    """The same size and classes, so that only content tells them apart."""
    return folder_of(tmp_path / "new", level=20)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.beton"


def run(source: str, dest: Path, **options: object) -> None:
    convert(source, dest, workers=1, progress=False, **options)  # type: ignore[arg-type]


def content(dest: Path) -> tuple[int, str]:
    """The grey of a whole pair, and its source as the manifest has it."""
    verify(dest, num_threads=1)
    images = open_beton(dest)
    level = int(np.asarray(images.image(0)).max())
    images.close()
    return level, images.manifest.source.rpartition("/")[2]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# What the system is asked for while a pair is published, in this order.
STEPS = ("fsync file", "fsync folder", "name file", "name manifest", "fsync folder again")


def strike(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    """Let one step of `publish` fail; the ones before it are done."""
    real_fsync, real_replace, real_link = os.fsync, Path.replace, os.link
    seen: list[str] = []

    def fsync(descriptor: int) -> None:
        seen.append("fsync")
        which = {2: "fsync file", 3: "fsync folder", 4: "fsync folder again"}
        if which.get(len(seen)) == step:  # the first is the .beton's own
            raise error
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        if step == ("name file" if self.name.endswith(".part") else "name manifest"):
            raise error
        return real_replace(self, target)

    def link(source: Path, target: Path) -> None:
        if step == "name file":
            raise error
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cleans_up", [True, False])
def test_a_kill_at_any_step_leaves_an_old_pair_or_a_new_pair(
    old: str, new: str, dest: Path, monkeypatch: pytest.MonkeyPatch, step: str, cleans_up: bool
) -> None:
    run(old, dest)
    with monkeypatch.context() as patch:
        strike(patch, step, KeyboardInterrupt())
        if not cleans_up:  # as after SIGKILL: nobody removes anything any more
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run(new, dest, overwrite=True)
    is_new = step in ("name manifest", "fsync folder again")
    assert content(dest) == ((20, "new") if is_new else (10, "old"))
    if cleans_up and not is_new:
        assert names_in(dest.parent) == {"x.beton", "x.beton.json"}
    run(old, dest, overwrite=True)
    assert content(dest) == (10, "old") and names_in(dest.parent) == {"x.beton", "x.beton.json"}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_a_new_pair_or_none(
    new: str, dest: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        strike(patch, step, KeyboardInterrupt())
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run(new, dest)
    if dest.exists():
        assert content(dest) == (20, "new")
    run(new, dest, overwrite=True)
    assert content(dest) == (20, "new") and names_in(dest.parent) == {"x.beton", "x.beton.json"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_error_of_the_disk_at_any_step_is_one_line_with_the_path(
    old: str, new: str, dest: Path, monkeypatch: pytest.MonkeyPatch, step: str, overwrite: bool
) -> None:
    if overwrite:
        run(old, dest)
    with monkeypatch.context() as patch:
        strike(patch, step, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(DataError, match=r"out: cannot be written to \(Input/output error\)") as caught:
            run(new, dest, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    if not overwrite:
        assert names_in(dest.parent) == set()
    else:
        assert content(dest)[1] == ("new" if step in STEPS[3:] else "old")
    assert not list(dest.parent.glob(".*"))


def test_a_name_killed_between_its_two_links_is_not_written_to(
    old: str, new: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part file is then the published file's second name."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run(old, dest)
    part = dest.with_name(".x.beton.part")
    assert part.samefile(dest)
    with pytest.raises(DataError, match=r"x\.beton: exists"):
        run(new, dest)
    with monkeypatch.context() as patch:
        patch.setattr("loaders.convert.run.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(new, dest, overwrite=True)
    assert content(dest) == (10, "old")


def test_a_name_that_was_taken_meanwhile_stays_as_it_is(
    new: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = publish._rename_to_new

    def taken(part: Path, dest: Path) -> None:
        dest.write_text("mine")
        whole(part, dest)

    monkeypatch.setattr(publish, "_rename_to_new", taken)
    with pytest.raises(DataError, match=r"x\.beton: was made by somebody else meanwhile"):
        run(new, dest)
    assert dest.read_text() == "mine" and names_in(dest.parent) == {"x.beton"}


def test_a_second_conversion_to_a_name_is_refused_while_the_first_is_at_work(new: str, dest: Path) -> None:
    with publish.part_file(dest) as part:
        part.write_text("half")
        for overwrite in (False, True):
            with pytest.raises(DataError, match=r"x\.beton: another process is converting to this name"):
                run(new, dest, overwrite=overwrite)
        assert part.read_text() == "half"
    assert names_in(dest.parent) == set()
    run(new, dest)


def test_what_a_killed_process_left_is_removed(new: str, dest: Path) -> None:
    dest.with_name(".x.beton.part").write_text("half")
    next_manifest_path(dest).write_text("of the one before")
    run(new, dest)
    assert content(dest)[0] == 20 and names_in(dest.parent) == {"x.beton", "x.beton.json"}


def test_a_part_file_that_another_process_has_made_since_is_left_alone(dest: Path) -> None:
    with publish.part_file(dest) as part:
        part.rename(dest)
        part.write_text("another's")
    assert part.read_text() == "another's"


def test_where_there_are_no_locks_a_part_file_is_somebody_s(
    new: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    dest.with_name(".x.beton.part").write_text("half")
    with pytest.raises(DataError, match=r"\.x\.beton\.part: exists; if no other process is converting"):
        run(new, dest)
    dest.with_name(".x.beton.part").unlink()
    run(new, dest)
    assert content(dest)[0] == 20


def test_where_there_are_no_hard_links_the_file_is_renamed(
    new: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    run(new, dest)
    assert content(dest)[0] == 20 and names_in(dest.parent) == {"x.beton", "x.beton.json"}


@pytest.mark.parametrize("which", ["file", "manifest", "waiting manifest"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_regular_files_are_replaced(new: str, dest: Path, which: str, kind: str) -> None:
    path = {"file": dest, "manifest": manifest_path(dest), "waiting manifest": next_manifest_path(dest)}[
        which
    ]
    if kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"is a folder|is not a regular file"):
        run(new, dest, overwrite=True)
    assert os.path.lexists(path) and Path("/dev/null").is_char_device()


def test_the_null_device_is_no_destination(new: str) -> None:
    with pytest.raises(DataError, match="/dev/null: is not a regular file"):
        run(new, Path("/dev/null"), overwrite=True)


def test_a_manifest_that_is_there_is_not_replaced_unasked(new: str, dest: Path) -> None:
    manifest_path(dest).write_text("mine")
    with pytest.raises(DataError, match=r"x\.beton\.json: exists.*--overwrite"):
        run(new, dest)
    assert manifest_path(dest).read_text() == "mine"


def test_a_link_is_followed_to_the_file_that_is_made(old: str, new: str, dest: Path, tmp_path: Path) -> None:
    run(old, dest)
    link = tmp_path / "link.beton"
    link.symlink_to(dest)
    run(new, link, overwrite=True)
    assert link.is_symlink() and content(dest)[0] == 20 and content(link)[0] == 20


def test_a_circle_of_links_is_no_destination(new: str, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    with pytest.raises(DataError, match=r"x: cannot be a file \(.*\); choose another place") as caught:
        run(new, tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_a_pair_that_is_replaced_while_it_is_opened_is_opened_whole(
    old: str, new: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the manifest and the look at the file, both change."""
    from loaders import manifest as manifest_module

    run(old, dest)
    load = manifest_module.Manifest.load

    def load_and_replace(path: Path) -> object:
        manifest = load(path)
        if manifest.source.endswith("old"):
            run(new, dest, overwrite=True)
        return manifest

    monkeypatch.setattr(manifest_module.Manifest, "load", staticmethod(load_and_replace))
    assert check_opening(dest).source.endswith("new")


def test_sigterm_cleans_up_and_ends_with_143(tmp_path: Path, dest: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "a" / "0.png", compress_level=1)
    for index in range(1, 900):  # a minute's work
        os.link(tmp_path / "in" / "a" / "0.png", tmp_path / "in" / "a" / f"{index}.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "fast_essl", "convert", str(tmp_path / "in"), str(dest), "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    part = dest.with_name(".x.beton.part")
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert names_in(dest.parent) == set()


def standing_still(sample: Sample) -> str:
    if sample.name == "40":
        os.kill(os.getpid(), signal.SIGSTOP)
    return sample.name


def test_a_worker_that_stands_still_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_WAIT_VARIABLE, "2")
    samples = [Sample(str(index), 0, bytes(1 << 18)) for index in range(80)]
    with pytest.raises(DataError, match=r"40: a worker process gave nothing for 2 s") as caught:
        list(map_samples(standing_still, samples, num_workers=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "1.5"])
def test_a_time_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(MAX_WAIT_VARIABLE, text)
    with pytest.raises(DataError, match=f"{MAX_WAIT_VARIABLE} = .*give a whole number of seconds"):
        list(map_samples(standing_still, [Sample("0", 0, b"")] * 3, num_workers=2))
