"""A run's folder: full disks, pipes in place of files, what killed processes left, and the checkout it describes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_essl import run_folder
from fast_essl.checkpoint import load_file, save_file
from fast_essl.cli import main
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import load_config
from fast_essl.evaluate_run import evaluate_run
from fast_essl.pretrain import pretrain
from fast_essl.run_folder import MetricsFile
from loaders.errors import DataError

SHORT = "--train.max-steps 4 --train.checkpoint-every 2 --train.knn-every 0"


def _config(path: Path, options: str = "") -> Config:
    return load_config(path, [*SHORT.split(), *options.split()])


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run_dir / run_folder.CHECKPOINT)["method"]
    return weights


class FullDisk:
    """In place of `os.fsync`: fails at one of its calls, counted from 1."""

    def __init__(self, failing: int) -> None:
        self.failing, self.num_calls = failing, 0

    def __call__(self, descriptor: int) -> None:
        self.num_calls += 1
        if self.num_calls == self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_any_write_names_the_file_and_loses_no_checkpoint(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, errors = tmp_path / "run", list[OSError]()
    # Of the files and their folders, one after the other; with the last, nothing fails any more.
    for failing in (1, 3, 5, 6, 7, 6, 8, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk(failing))
            try:
                pretrain(_config(tiny_config), run_dir, show_progress=False)
                break
            except OSError as error:
                errors.append(error)
        assert list(run_dir.glob("*.part")) == []
        if (run_dir / run_folder.CHECKPOINT).exists():
            assert load_file(run_dir / run_folder.CHECKPOINT)["step"] in (2, 4)
    assert failing == 1000 and {error.errno for error in errors} == {errno.ENOSPC}
    assert {Path(error.filename).parent for error in errors} == {run_dir}
    names = ["backbone.pt", "config.toml", "environment.json", "last.pt", "metrics.jsonl"]
    assert sorted({Path(error.filename).name for error in errors}) == names
    # Last, since the first steps of a process differ from later ones by rounding.
    pretrain(_config(tiny_config), tmp_path / "whole", show_progress=False)
    expected = _weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in _weights(run_dir).items())


def test_the_command_tells_of_a_full_disk_in_one_line(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", FullDisk(6))
    assert main(["pretrain", str(tiny_config), "--run-dir", str(tmp_path / "run"), *SHORT.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == [f"fast-essl: error: {tmp_path}/run/last.pt: No space left on device; not written"]


def test_a_full_disk_leaves_no_part_of_a_metrics_line(tmp_path: Path) -> None:
    path = tmp_path / run_folder.METRICS
    metrics = MetricsFile(path)
    metrics.write(step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            metrics.write(step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(path)
    metrics.write(step=3)
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_metrics_that_lost_bytes_are_cut_to_whole_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / run_folder.METRICS
    path.write_text('{"step": 1}\n{"step"')
    metrics = MetricsFile(path, num_bytes=24)
    metrics.write(step=3)
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert f"{path}: holds 12 bytes of whole lines and had 24" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["config.toml", "environment.json", "metrics.jsonl", "last.pt", "backbone.pt", ".lock"]
)
def test_a_pipe_in_place_of_a_file_is_refused_before_any_step(
    tiny_config: Path, tmp_path: Path, name: str
) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{tmp_path / name}: is a pipe"):
        pretrain(_config(tiny_config), tmp_path, show_progress=False)
    assert os.listdir(tmp_path) == [name] or name == ".lock"


@pytest.mark.parametrize(
    ("name", "error"),
    [("config.toml", ConfigError), ("last.pt", ConfigError), ("evaluation.json", DataError)],
)
def test_a_pipe_does_not_stop_an_evaluation(
    tiny_config: Path, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 1"), tmp_path, show_progress=False)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(error, match=str(tmp_path)):
        evaluate_run(tmp_path)


def test_a_pipe_is_no_backbone_to_start_from(tiny_config: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    config = _config(tiny_config, f"--train.init-from {tmp_path / 'pipe.pt'}")
    with pytest.raises(DataError, match=r"pipe\.pt: is a pipe"):
        pretrain(config, tmp_path / "run", show_progress=False)


def test_what_a_killed_process_was_writing_is_removed_when_the_run_continues(
    tiny_config: Path, tmp_path: Path
) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 1"), tmp_path, show_progress=False)
    for name in ("last.pt.part", f".last.pt.{os.getpid()}.part", ".evaluation.json.1.part"):
        (tmp_path / name).write_bytes(b"half")
    pretrain(_config(tiny_config), tmp_path, show_progress=False)
    assert list(tmp_path.glob("*.part")) == []


def test_a_backbone_is_that_of_the_last_checkpoint(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 1"), tmp_path, show_progress=False)
    assert load_file(tmp_path / run_folder.BACKBONE)["step"] == 1
    write = MetricsFile.write

    def write_and_stop(self: MetricsFile, **values: Any) -> None:
        write(self, **values)
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", write_and_stop)
        assert pretrain(_config(tiny_config), tmp_path, show_progress=False).status == "stopped"
    assert not (tmp_path / run_folder.BACKBONE).exists()
    pretrain(_config(tiny_config), tmp_path, show_progress=False)
    backbone = load_file(tmp_path / run_folder.BACKBONE)
    assert backbone["step"] == 4
    (tmp_path / run_folder.BACKBONE).unlink()
    assert pretrain(_config(tiny_config), tmp_path, show_progress=False).status == "already finished"
    again = load_file(tmp_path / run_folder.BACKBONE)["backbone"]
    assert all(torch.equal(value, again[name]) for name, value in backbone["backbone"].items())


@pytest.mark.parametrize("part", ["method", "rate", "momentum", "evaluated"])
def test_a_checkpoint_of_other_tensors_is_one_line(tiny_config: Path, tmp_path: Path, part: str) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 1"), tmp_path, show_progress=False)
    path = tmp_path / run_folder.CHECKPOINT
    state = load_file(path)
    if part == "method":
        state["method"].popitem()
    elif part == "rate":
        del state["optimizer"]["param_groups"][0]["lr"]
    elif part == "momentum":
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    else:
        del state["evaluated_step"]
    save_file(path, state)
    with pytest.raises(DataError, match=f"{path}: ") as error:
        pretrain(_config(tiny_config), tmp_path, show_progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_told_and_the_checkout_s_index_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "fast_essl" / "run_folder.py"
    source.parent.mkdir()
    source.touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    os.utime(source, (1, 1))  # what `git status` writes to the index
    index = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(run_folder, "__file__", str(source))
    commit = run_folder.describe_environment("a command")["commit"]
    assert commit is not None and len(commit) == 40
    assert (tmp_path / ".git" / "index").read_bytes() == index


def test_two_processes_do_not_train_in_one_folder(tiny_config: Path, tmp_path: Path) -> None:
    with run_folder.held(tmp_path), pytest.raises(ConfigError, match="another process trains here"):
        pretrain(_config(tiny_config), tmp_path, show_progress=False)


def test_an_evaluation_tells_what_it_is_of(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 1"), tmp_path, show_progress=False)
    first = evaluate_run(tmp_path)
    assert json.loads((tmp_path / run_folder.EVALUATION).read_text()) == first
    pretrain(_config(tiny_config), tmp_path, show_progress=False)
    second = evaluate_run(tmp_path)
    assert first["measured"]["weights"] != second["measured"]["weights"]
    assert first["measured"]["test"] == second["measured"]["test"]
